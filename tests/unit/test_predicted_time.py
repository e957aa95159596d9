"""The time of a training by like runs: what makes runs alike, whose times count, and what is said where none is."""

from __future__ import annotations

from typing import Any

import pytest

from lora_lab.record.run_record import RunRecord
from lora_lab.study.predicted_time import PredictedTime, Speeds, predicted_time
from tests.unit.ledger_samples import as_member
from tests.unit.study_samples import record_of
from tests.unit.test_plan_cohorts import SGD, SOPHIA, method_of
from tests.unit.test_plan_trials import NF4, SHAPE, trial_of

IDENTITIES = {"base": "random", "data": "skills"}
TRAINING = {"epochs": None, "max_steps": 7}


def run(seconds: float | None = 2.0, steps: int = 10, executed: str = "alone", **changes: Any) -> RunRecord:
    """A run of this machine ("m1") whose steps took so long together."""
    identities = changes.pop("identities", IDENTITIES)
    measured = {"steps": steps} | ({} if seconds is None else {"step_seconds": seconds})
    trial = trial_of(**changes).model_dump(mode="json")
    return record_of(trial, identities=identities, measurements=measured, facts={"executed": executed})


def time_of(records: list[RunRecord], steps: int | None = 100, **changes: Any) -> tuple[PredictedTime | None, str]:
    return predicted_time(records, trial_of(**changes), IDENTITIES, steps, machine="m1")


def test_it_is_the_median_of_the_time_per_step_times_the_steps() -> None:
    runs = [run(2.0, 10, seed=0), run(9.0, 30, seed=1), run(100.0, 20, seed=2)]  # 0.2, 0.3 and 5 s per step
    found, why = time_of(runs)
    assert found == PredictedTime(seconds=pytest.approx(30.0), step_seconds=pytest.approx(0.3), runs=3)
    assert why == "median of 3 runs like it"
    assert time_of(runs[:1]) == (PredictedTime(pytest.approx(20.0), pytest.approx(0.2), 1), "by 1 run like it")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 3},
        {"seeds": {"data": 9}},
        {"alpha": 99.0},
        {"learning_rate": 0.5},
        {"scheduler": {"kind": "constant", "warmup_steps": None, "warmup_ratio": 0.1}},
        {"training": TRAINING},
        {"training": {"max_gradient_norm": None}},
        {"training": {"layer_rates": [1.0, 0.5]}},
        {"optimizer": {"weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6}},
        {"evaluation": {"heldout": False, "tasks": ["prose"]}},
        {"data": {"train_seed": 5, "heldout_size": 20, "heldout_seed": 8}},
        {"model": {"name": "other", "seed": 4}},
        {"init_from": "0123456789abcdef"},
    ],
    ids=str,
)
def test_what_changes_no_steps_work_is_not_asked_of(changes: dict[str, Any]) -> None:
    found, _ = time_of([run()], **changes)
    assert found is not None and found.runs == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 4}, "rank"),
        ({"dropout": 0.1}, "dropout"),
        ({"parts": ["query", "mlp"]}, "target"),
        ({"method": method_of("rslora")}, "method"),
        ({"method": method_of("full")}, "method"),
        ({"method": {"kind": "lora", "rank_factors": [2.0]}}, "method.rank_factors"),
        ({"quantization": NF4}, "quantization"),
        ({"optimizer": SGD}, "optimizer"),
        ({"model": {"shape": {**SHAPE, "num_layers": 4}}}, "model.shape.num_layers"),
        ({"training": {"precision": "bf16"}}, "training.precision"),
        ({"training": {"batch_size": 16}}, "training.batch_size"),
        (
            {"training": {"micro_batch_size": 2, "bucket_batches": 1}},
            "training.micro_batch_size, training.bucket_batches",
        ),
        ({"training": {"gradient_checkpointing": "sqrt"}}, "training.gradient_checkpointing"),
        ({"data": {"max_length": 64}}, "data.max_length"),
        ({"rank": 2, "data": {"train_size": 50, "loss_on": "all"}}, "rank, data.train_size, data.loss_on"),
    ],
    ids=str,
)
def test_what_changes_a_steps_work_keeps_a_run_out_and_is_named(changes: dict[str, Any], told: str) -> None:
    found, why = time_of([run()], **changes)
    assert found is None
    names = why.removeprefix("no run like it in this machine's ledger; 1 run differs in: ")
    assert sorted(names.split(", ")) == sorted(told.split(", "))


def test_a_momentum_is_work_and_how_large_it_is_not() -> None:
    momentum = {**SGD, "momentum": 0.9}
    assert time_of([run(optimizer=momentum)], optimizer={**SGD, "momentum": 0.5, "nesterov": True})[0] is not None
    assert time_of([run(optimizer=momentum)], optimizer=SGD)[1].endswith("differs in: optimizer.momentum")
    assert time_of([run(optimizer=SOPHIA)], optimizer={**SOPHIA, "rho": 2.0})[0] is not None
    assert time_of([run(optimizer=SOPHIA)], optimizer={**SOPHIA, "estimate_interval": 1})[0] is None


def test_axes_that_a_method_does_not_use_are_not_asked_of() -> None:
    full = method_of("full")
    assert time_of([run(method=full, rank=2)], method=full, rank=64, parts=["mlp"])[0] is not None


def test_other_files_under_the_same_settings_are_other_work() -> None:
    elsewhere = run(identities={**IDENTITIES, "data": "other rows"})
    assert time_of([elsewhere]) == (None, "no run like it in this machine's ledger; 1 run differs in: data")
    assert time_of([run(identities={**IDENTITIES, "heldout": "x", "tasks": "y"})])[0] is not None


def test_the_nearest_runs_are_named_by_what_they_differ_in() -> None:
    far = [run(rank=2, dropout=0.1, seed=seed) for seed in range(5)]
    near = [run(rank=2, seed=seed) for seed in range(3)] + [run(dropout=0.1)]
    assert time_of([*far, *near])[1] == "no run like it in this machine's ledger; 3 runs differ in: rank"


def test_only_times_that_are_a_runs_own_count() -> None:
    member = as_member("c1", ["a", "b"], seats=2, wall=10.0)
    together = record_of(trial_of().model_dump(mode="json"), identities=IDENTITIES, **member)
    found, why = time_of([together])
    assert found is None
    assert why == "1 run like it, trained in cohorts; launch.cohort=off repeat=1 measures one alone"
    alone, why = time_of([together, run(3.0, seed=1)])
    assert alone is not None and alone.runs == 1 and why == "by 1 run like it"
    # Its own name on a shared number would not be believed either.
    assert time_of([run(executed="cohort")])[0] is None


def test_a_run_without_a_step_has_no_speed() -> None:
    unmeasured = run(None, 0)
    assert unmeasured.result is not None
    assert time_of([unmeasured]) == (None, "1 run like it, without a measured step")
    why = {"step_seconds": "no step was finished"}
    told = record_of(unmeasured.trial, identities=IDENTITIES, facts={"executed": "alone"}, missing=why)
    assert time_of([told]) == (None, "1 run like it, without a measured step (no step was finished)")


def test_runs_of_other_machines_are_not_asked() -> None:
    here = predicted_time([run(), run(seed=1)], trial_of(), IDENTITIES, 10, machine="m2")
    assert here == (None, "no run of this machine in the ledger (2 runs of other machines)")
    assert time_of([]) == (None, "no run in this machine's ledger has trained anything")
    assert time_of([run(method=method_of("base"))])[1] == "no run in this machine's ledger has trained anything"


def test_without_steps_there_is_no_time() -> None:
    assert time_of([run()], steps=None) == (None, "the number of steps is not known")
    assert time_of([run()], method=method_of("base")) == (None, "an untouched base takes no step")


def test_many_trials_read_the_records_once() -> None:
    speeds = Speeds((run(), run(rank=2)), "m1")
    assert speeds.predicted_time(trial_of(), IDENTITIES, 10)[0] == PredictedTime(2.0, 0.2, 1)
    found, _ = speeds.predicted_time(trial_of(rank=2), IDENTITIES, 20)
    assert found is not None and found.seconds == 4.0
