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

from lora_lab.adapters.attach import Attached
from lora_lab.adapters.dropout import DropoutClock
from lora_lab.data.batches import Batches
from lora_lab.data.encode import Encoded
from lora_lab.optim.optimizers import build_optimizer, build_schedule
from lora_lab.plan.steps import learning_rate_multiplier, steps_of
from lora_lab.schema.trial import Trial


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
    dropout_clock: DropoutClock | None
    step: int = 0
    diverged: str | None = None
    records: list[StepRecord] = field(default_factory=list)

    @property
    def is_active(self) -> bool:
        """Whether there are steps left to take."""
        return self.diverged is None and self.step < self.total_steps


def member_of(trial: Trial, attached: Attached, examples: Sequence[Encoded], *, name: str) -> Member:
    """A trial as a member of a cohort: its own optimizer, schedule and data order over `examples`."""
    lengths = [len(example.input_ids) for example in examples]
    steps = steps_of(trial, len(lengths))
    assert steps is not None  # only method=base has no steps
    parameters = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]

    def new_optimizer(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(trial.optimizer, params, learning_rate=trial.learning_rate)

    optimizer = new_optimizer(parameters)
    return Member(
        name=name,
        parameters=parameters,
        build_optimizer=new_optimizer,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, learning_rate_multiplier(trial.scheduler, steps)),
        examples=examples,
        batches=Batches(
            lengths,
            batch_size=trial.training.batch_size,
            micro_batch_size=trial.training.micro_batch_size,
            seed=trial.seeds.data,
            bucket_batches=trial.training.bucket_batches,
        ),
        total_steps=steps.steps,
        max_gradient_norm=trial.training.max_gradient_norm,
        dropout_clock=attached.dropout_clock,
    )
