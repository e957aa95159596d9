"""How many optimizer steps a trial takes, and the learning rate at each: arithmetic that plan and training share.

The multipliers equal those of transformers.get_scheduler (constant_with_warmup, linear, cosine_with_min_lr,
warmup_stable_decay with linear warm-up and decay) at every step; a parity test compares them. As there, step 0 of a
warm-up has multiplier 0 (for wsd: the floor), so the first update of a warmed-up run changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lora_lab.errors import DataError, InputError, Problem
from lora_lab.schema.adapter_methods import AdaLora
from lora_lab.schema.optimization import Cosine, Linear, Scheduler, Wsd
from lora_lab.schema.trial import Trial


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The course of a training in optimizer steps.

    steps_per_epoch: None where the number of rows is not known (max_steps alone decides). decay_steps: the last steps
    of wsd, None for other schedules. micro_batches_per_step: of a full step; the last step of an epoch may be short.
    """

    steps_per_epoch: int | None
    steps: int
    warmup_steps: int
    decay_steps: int | None
    micro_batches_per_step: int


def steps_of(trial: Trial, train_rows: int | None) -> StepPlan | None:
    """The steps of a trial over `train_rows` rows, the short last batch of each epoch included.

    None where there is nothing to say: method=base has no steps, and epochs of an unknown number of rows no end.

    Raises:
        DataError: for zero rows.
        InputError: for a warm-up that does not end before training does, or that leaves no room for the decay; for an
            AdaLoRA without time to prune.
    """
    if trial.method.kind == "base":
        return None
    if train_rows == 0:
        raise DataError(Problem("data", "0 training rows"))
    training = trial.training
    per_epoch = None if train_rows is None else math.ceil(train_rows / training.batch_size)
    if training.max_steps is not None:
        steps = training.max_steps
    elif training.epochs is not None and per_epoch is not None:
        steps = training.epochs * per_epoch
    else:
        return None
    warmup = _warmup_steps(trial.scheduler, steps)
    decay = math.ceil(trial.scheduler.decay_ratio * steps) if isinstance(trial.scheduler, Wsd) else None
    _check_phases(steps, warmup, decay)
    if isinstance(trial.method, AdaLora):
        budget_phases(trial.method, steps)
    return StepPlan(
        steps_per_epoch=per_epoch,
        steps=steps,
        warmup_steps=warmup,
        decay_steps=decay,
        micro_batches_per_step=training.batch_size // training.micro_batch_size,
    )


def _warmup_steps(scheduler: Scheduler, steps: int) -> int:
    """A ratio is rounded up, as transformers.TrainingArguments.get_warmup_steps does."""
    if scheduler.warmup_steps is not None:
        return scheduler.warmup_steps
    if scheduler.warmup_ratio is not None:
        return math.ceil(scheduler.warmup_ratio * steps)
    raise AssertionError("the schema requires one of warmup_steps and warmup_ratio")


def _check_phases(steps: int, warmup: int, decay: int | None) -> None:
    if warmup >= steps:
        raise InputError(
            Problem("scheduler", f"warm-up of {warmup} steps does not end within the {steps} steps of training")
        )
    if decay is not None and warmup + decay > steps:
        raise InputError(
            Problem("scheduler", f"warm-up ({warmup}) and decay ({decay}) take more than the {steps} steps of training")
        )


def budget_phases(method: AdaLora, steps: int) -> tuple[int, int]:
    """The first steps without pruning and the last with the final budget, both rounded up.

    Raises:
        InputError: no step is left between them, or the only one is the first, after which importance is not known yet.
    """
    initial, final = math.ceil(method.initial_share * steps), math.ceil(method.final_share * steps)
    if initial >= steps - final or steps - final < 2:
        rule = (
            f"adalora with {steps} steps: the first {initial} (initial_share) and the last {final} (final_share) leave "
            "none in which the budget could shrink; train for more steps, or lower the shares"
        )
        raise InputError(Problem("method", rule))
    return initial, final


def learning_rate_multiplier(scheduler: Scheduler, steps: StepPlan) -> Callable[[int], float]:
    """The factor on the peak learning rate as a pure function of the step (0 is the first): fit for LambdaLR."""
    warmup, total = steps.warmup_steps, steps.steps
    if isinstance(scheduler, Wsd):
        return _wsd(scheduler, steps)

    def multiplier(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, total - warmup)
        if isinstance(scheduler, Linear):
            return max(0.0, (total - step) / max(1, total - warmup))
        if isinstance(scheduler, Cosine):
            wave = 0.5 * (1.0 + math.cos(math.pi * scheduler.cycles * 2.0 * progress))
            return max(0.0, wave * (1.0 - scheduler.floor) + scheduler.floor)
        return 1.0

    return multiplier


def _wsd(scheduler: Wsd, steps: StepPlan) -> Callable[[int], float]:
    """Here the warm-up rises from the floor, not from 0: transformers' definition of this schedule."""
    if steps.decay_steps is None:
        raise ValueError("a wsd schedule needs a StepPlan with decay_steps")
    warmup, decay, floor = steps.warmup_steps, steps.decay_steps, scheduler.floor
    decay_start = steps.steps - decay

    def multiplier(step: int) -> float:
        if step < warmup:
            return step / warmup * (1.0 - floor) + floor
        if step < decay_start:
            return 1.0
        if step < steps.steps:
            return (1.0 - (step - decay_start) / decay) * (1.0 - floor) + floor
        return floor

    return multiplier
