"""Numbers of steps, and learning rates equal to those of transformers' schedulers at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from lora_lab.errors import DataError, InputError
from lora_lab.plan.steps import StepPlan, learning_rate_multiplier, steps_of
from tests.unit.test_plan_trials import trial_of


def planned(rows: int | None, *, scheduler: dict[str, Any] | None = None, **training: Any) -> StepPlan | None:
    changes = {} if scheduler is None else {"scheduler": scheduler}
    return steps_of(trial_of(training=training, **changes), rows)


@pytest.mark.parametrize(("rows", "per_epoch"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (100, 13)])
def test_the_short_last_batch_is_a_step(rows: int, per_epoch: int) -> None:
    plan = planned(rows)
    assert plan == StepPlan(
        steps_per_epoch=per_epoch, steps=2 * per_epoch, warmup_steps=0, decay_steps=None, micro_batches_per_step=2
    )


def test_max_steps_decides_alone() -> None:
    plan = planned(100, epochs=None, max_steps=5)
    assert plan is not None and (plan.steps, plan.steps_per_epoch) == (5, 13)
    unknown = planned(None, epochs=None, max_steps=5)
    assert unknown is not None and (unknown.steps, unknown.steps_per_epoch) == (5, None)


def test_no_answer_where_there_is_none() -> None:
    assert planned(None) is None
    assert steps_of(trial_of(method={"kind": "base"}), 100) is None
    with pytest.raises(DataError, match="0 training rows"):
        planned(0)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.03, 0.07, 0.1, 0.5, 0.55, 0.99])
@pytest.mark.parametrize("steps", [100, 137])
def test_warmup_ratio_rounds_as_transformers_does(ratio: float, steps: int, tmp_path: Any) -> None:
    plan = planned(
        None, epochs=None, max_steps=steps, scheduler={"kind": "constant", "warmup_steps": None, "warmup_ratio": ratio}
    )
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio)
    assert plan is not None and plan.warmup_steps == arguments.get_warmup_steps(steps)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            {"kind": "linear", "warmup_steps": 10, "warmup_ratio": None},
            "warm-up of 10 steps does not end within the 10",
        ),
        ({"kind": "constant", "warmup_steps": None, "warmup_ratio": 0.95}, "warm-up of 10 steps does not end"),
        (
            {"kind": "wsd", "warmup_steps": 6, "warmup_ratio": None, "decay_ratio": 0.5, "floor": 0.0},
            r"warm-up \(6\) and decay \(5\) take more than the 10 steps",
        ),
    ],
)
def test_phases_that_do_not_fit_are_refused(scheduler: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(None, epochs=None, max_steps=10, scheduler=scheduler)


SCHEDULES = [
    ("constant", {}, "constant_with_warmup", {}),
    ("linear", {}, "linear", {}),
    ("cosine", {"cycles": 0.5, "floor": 0.0}, "cosine", {}),
    ("cosine", {"cycles": 0.5, "floor": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine", {"cycles": 2.0, "floor": 0.25}, "cosine_with_min_lr", {"num_cycles": 2.0, "min_lr_rate": 0.25}),
    ("wsd", {"decay_ratio": 0.0, "floor": 0.0}, "warmup_stable_decay", {"decay_type": "linear"}),
    ("wsd", {"decay_ratio": 0.1, "floor": 0.0}, "warmup_stable_decay", {"decay_type": "linear"}),
    ("wsd", {"decay_ratio": 0.33, "floor": 0.2}, "warmup_stable_decay", {"decay_type": "linear", "min_lr_ratio": 0.2}),
]


@pytest.mark.parametrize(("kind", "values", "theirs", "arguments"), SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("steps", [8, 61])
def test_rates_equal_transformers(
    kind: str, values: dict[str, Any], theirs: str, arguments: dict[str, Any], warmup: int, steps: int
) -> None:
    trial = trial_of(
        training={"epochs": None, "max_steps": steps},
        scheduler={"kind": kind, "warmup_steps": warmup, "warmup_ratio": None, **values},
    )
    if kind == "wsd" and warmup + values["decay_ratio"] * steps > steps:
        pytest.skip("refused: warm-up and decay overlap")
    plan = steps_of(trial, None)
    assert plan is not None
    if kind == "wsd":
        arguments = {**arguments, "num_decay_steps": plan.decay_steps}
    ours = learning_rate_multiplier(trial.scheduler, plan)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=arguments
    )
    for step in range(steps + 3):
        assert ours(step) == reference.get_last_lr()[0], step
        optimizer.step()
        reference.step()


def test_the_decay_is_the_share_that_was_asked_for() -> None:
    plan = planned(
        None, epochs=None, max_steps=20,
        scheduler={"kind": "wsd", "warmup_steps": 0, "warmup_ratio": None, "decay_ratio": 0.1, "floor": 0.0},
    )  # fmt: skip
    assert plan is not None and plan.decay_steps == 2
