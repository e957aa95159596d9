"""A member of a cohort: one trial's own parameters, optimizer, schedule, data order and randomness.

A single run is a cohort of one. Members share nothing but the frozen base, so that one may diverge, end or be stopped
without changing another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lora_lab.adapters.dropout import DropoutClock
from lora_lab.data.batches import Batches
from lora_lab.data.encode import Encoded


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, as it goes to the step log. Losses are in nats per loss token, seconds are wall clock."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    loss_tokens: int
    padded_tokens: int
    seconds: float


@dataclass(slots=True)
class Member:
    """Mutable training state of one trial.

    `step` counts finished optimizer steps. `diverged` is the reason once loss or gradient norm was not finite; the
    weights are then those before the step that would have spread it.
    """

    name: str
    parameters: list[nn.Parameter]
    build_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    examples: Sequence[Encoded]
    batches: Batches
    total_steps: int
    max_gradient_norm: float | None
    dropout_clock: DropoutClock
    step: int = 0
    diverged: str | None = None
    records: list[StepRecord] = field(default_factory=list)

    @property
    def is_active(self) -> bool:
        """Whether there are steps left to take."""
        return self.diverged is None and self.step < self.total_steps
