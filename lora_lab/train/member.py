"""A member of a cohort: one trial's own parameters, optimizer, schedule, data order and randomness.

A single run is a cohort of one. Members share nothing but the frozen base, so that one may diverge, end or be stopped
without changing another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lora_lab.adapters.attach import Attached
from lora_lab.adapters.course import Auxiliary, Course
from lora_lab.adapters.dropout import DropoutClock
from lora_lab.data.batches import Batches
from lora_lab.data.encode import Encoded
from lora_lab.optim.groups import RateGroup, rate_groups
from lora_lab.optim.optimizers import build_optimizer, build_schedule
from lora_lab.plan.steps import learning_rate_multiplier, steps_of
from lora_lab.schema.trial import Trial
from lora_lab.schema.weight_methods import Galore, Lisa
from lora_lab.train.curvature import CurvatureSchedule, curvature_of
from lora_lab.train.forward import MicroBatch
from lora_lab.train.projection import projected


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, as it goes to the step log. Losses are in nats per loss token, seconds are wall clock.

    loss: the language model's alone. auxiliary: other losses by name, before their weights. seconds: None where the
    time was shared with other members. padded_tokens: all that were computed.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    loss_tokens: int
    padded_tokens: int
    seconds: float | None
    auxiliary: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Every number of the step by name, as the step log has them."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "auxiliary"}
        return {name: value for name, value in {**own, **self.auxiliary}.items() if value is not None}


@dataclass(slots=True)
class OpenStep:
    """A step that is being gathered. work: its micro-batches; done: how many of them have been through.

    loss, auxiliary: so far; the latter stay on their device until the step is complete.
    """

    work: list[MicroBatch]
    done: int = 0
    loss: float = 0.0
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    loss_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Counts what the whole step's loss is divided by."""
        self.loss_tokens = sum(one.loss_tokens for one in self.work)

    @property
    def is_complete(self) -> bool:
        """Whether all micro-batches have been through."""
        return self.done == len(self.work)

    @property
    def last(self) -> MicroBatch:
        """The micro-batch that has been through last."""
        return self.work[self.done - 1]

    def add_auxiliary(self, name: str, value: Tensor) -> None:
        """A further part of the auxiliary loss `name`."""
        self.auxiliary[name] = self.auxiliary[name] + value if name in self.auxiliary else value


@dataclass(slots=True)
class Member:
    """Mutable training state of one trial.

    parameters: all that may change; those of the moment are `active_parameters`. learning_rate: of a step, before the
    factors of layers and matrices. `step` counts finished optimizer steps. `diverged` is the reason once loss or
    gradient norm was not finite; the weights are then those before the step that would have spread it.
    """

    name: str
    parameters: list[nn.Parameter]
    build_optimizer: Callable[[], torch.optim.Optimizer]
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    learning_rate: Callable[[int], float]
    examples: Sequence[Encoded]
    batches: Batches
    total_steps: int
    max_gradient_norm: float | None
    dropout_clock: DropoutClock | None
    auxiliary: Auxiliary | None
    course: Course | None
    curvature: CurvatureSchedule | None
    step: int = 0
    diverged: str | None = None
    records: list[StepRecord] = field(default_factory=list)
    open_step: OpenStep | None = None

    @property
    def is_active(self) -> bool:
        """Whether there are steps left to take."""
        return self.diverged is None and self.step < self.total_steps

    @property
    def opened(self) -> OpenStep:
        """The step that is being gathered; an AssertionError where there is none."""
        assert self.open_step is not None
        return self.open_step

    def set_clock(self, micro_batch: int) -> None:
        """Moves the member's dropout to a micro-batch of the present step."""
        if self.dropout_clock is not None:
            self.dropout_clock.step, self.dropout_clock.micro_batch = self.step, micro_batch

    def abandon_step(self) -> None:
        """Forgets what was gathered of the open step, which begins anew."""
        self.open_step = None
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def active_parameters(self) -> list[nn.Parameter]:
        """What receives gradients now."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


def member_of(trial: Trial, attached: Attached, examples: Sequence[Encoded], *, name: str) -> Member:
    """A trial as a member of a cohort: its own optimizer, schedule and data order over `examples`."""
    lengths = [len(example.input_ids) for example in examples]
    steps = steps_of(trial, len(lengths))
    assert steps is not None  # only method=base has no steps
    multiplier = learning_rate_multiplier(trial.scheduler, steps)
    optimizer = optimizer_of(trial, attached, attached.trained)

    def probe_optimizer() -> torch.optim.Optimizer:
        return optimizer_of(trial, attached, [(key, one) for key, one in attached.trained if one.requires_grad])

    return Member(
        name=name,
        parameters=[parameter for _, parameter in attached.trained],
        build_optimizer=probe_optimizer,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, multiplier),
        learning_rate=lambda step: trial.learning_rate * multiplier(step),
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
        auxiliary=attached.auxiliary,
        course=attached.course,
        curvature=curvature_of(trial),
    )


def optimizer_of(trial: Trial, attached: Attached, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The trial's optimizer over `named` parameters, grouped by rate; for galore in the projected space."""
    config = attached.model.config
    groups = rate_groups(trial, named, num_layers=config.num_hidden_layers)

    def build(wanted: Sequence[RateGroup]) -> torch.optim.Optimizer:
        optimizer = build_optimizer(trial.optimizer, wanted, learning_rate=trial.learning_rate)
        if isinstance(trial.method, Lisa) and isinstance(optimizer, torch.optim.SGD):
            for group in optimizer.param_groups:  # torch's fused SGD wants momentum of all tensors or of none
                group["fused"] = False
        return optimizer

    return projected(trial, attached.model, groups, build) if isinstance(trial.method, Galore) else build(groups)
