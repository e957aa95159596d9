"""The table of settings: what is averaged, what is only counted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lab.errors import InputError
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord, read_record
from lora_lab.study.answer import answer_of
from lora_lab.study.interval import t_interval
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import as_member, claim, ended, loss, trial_of

ALONE = {"executed": "alone"}


def _seeds(root: Path, values: list[float], **changes: object) -> list[RunRecord]:
    return [
        ended(root, trial_of(seed=seed, **changes), metrics={"heldout/loss": loss(value)})
        for seed, value in enumerate(values)
    ]


def test_mean_and_interval_over_three_seeds(tmp_path: Path) -> None:
    (row,) = settings_table(_seeds(tmp_path, [2.0, 2.2, 2.7]), metrics=None).rows
    cell = row.cells["heldout/loss"]
    assert row.name == "lora-r8" and row.completed == row.runs == 3
    assert cell.mean == pytest.approx(2.3)
    assert cell.interval == t_interval([2.0, 2.2, 2.7])
    assert [(point.seed, point.value) for point in cell.points] == [(0, 2.0), (1, 2.2), (2, 2.7)]


def test_two_seeds_have_points_and_no_interval(tmp_path: Path) -> None:
    (row,) = settings_table(_seeds(tmp_path, [2.0, 2.2]), metrics=None).rows
    cell = row.cells["heldout/loss"]
    assert cell.interval is None and [point.value for point in cell.points] == [2.0, 2.2]


def test_failed_and_diverged_runs_are_counted_never_averaged(tmp_path: Path) -> None:
    records = _seeds(tmp_path, [2.0, 2.2])
    records.append(
        ended(
            tmp_path,
            trial_of(seed=2),
            status=Status.DIVERGED,
            reason="loss is NaN at step 3\nmore",
            metrics={"heldout/loss": loss(99.0)},
        )
    )
    records.append(ended(tmp_path, trial_of(seed=3), status=Status.FAILED, reason="boom"))
    held = claim(Ledger(tmp_path), trial_of(seed=4))
    assert held is not None
    with held:
        records.append(read_record(held.path))
    (row,) = settings_table(records, metrics=None).rows
    assert row.statuses == {"COMPLETED": 2, "DIVERGED": 1, "FAILED": 1, "RUNNING": 1}
    assert (row.completed, row.runs) == (2, 5)
    assert row.cells["heldout/loss"].mean == pytest.approx(2.1)
    assert "DIVERGED: loss is NaN at step 3" in row.reasons[0] and "more" not in row.reasons[0]


def test_repeats_of_a_trial_count_once_for_scores_and_each_for_time(tmp_path: Path) -> None:
    times = [10.0, 20.0, 60.0]
    records = [
        ended(
            tmp_path,
            trial_of(),
            repeat=repeat,
            metrics={"heldout/loss": loss(2.0)},
            measurements={"train_seconds": seconds},
            facts=ALONE,
        )
        for repeat, seconds in enumerate(times)
    ]
    (row,) = settings_table(records, metrics=None).rows
    assert len(row.cells["heldout/loss"].points) == 1 and row.cells["heldout/loss"].interval is None
    assert row.cost["train_seconds"] == 20.0


def test_bytes_are_the_largest_and_times_come_from_runs_executed_alone(tmp_path: Path) -> None:
    cases = [(5, 10.0, ALONE), (9, 30.0, ALONE), (7, 1.0, {"executed": "cohort"})]
    records = [
        ended(
            tmp_path,
            trial_of(seed=seed),
            measurements={"peak_allocated_bytes": peak, "train_seconds": seconds, "tokens_per_second": seconds},
            facts=facts,
        )
        for seed, (peak, seconds, facts) in enumerate(cases)
    ]
    (row,) = settings_table(records, metrics=None).rows
    assert row.cost == {"peak_allocated_bytes": 9, "train_seconds": 20.0, "tokens_per_second": 20.0}
    assert (row.runs_alone, row.completed) == (2, 3)
    (row,) = settings_table(records[2:], metrics=None).rows
    assert row.cost == {}, "not even a number that stands under the run's name"
    assert row.missing["train_seconds"] == "no run was executed alone (1 of 1 trained in cohorts)"


def test_of_several_repeats_those_made_alone_are_the_time_and_scores_count_once(tmp_path: Path) -> None:
    """In a cohort first, then twice alone: one score, a median of two times; the base is no repeat of it."""
    trial = trial_of()
    together = as_member("c1", ["a", "b"], seats=2, wall=9.0, on_cpu=False)
    ended(tmp_path, trial, metrics={"heldout/loss": loss(2.0)}, **together)
    for repeat, seconds in ((1, 10.0), (2, 20.0)):
        measured = {"train_seconds": seconds, "peak_allocated_bytes": int(seconds)}
        ended(tmp_path, trial, repeat=repeat, metrics={"heldout/loss": loss(2.0)}, measurements=measured, facts=ALONE)
    ended(tmp_path, trial_of(seed=1), metrics={"heldout/loss": loss(3.0)}, **together)
    table = settings_table(Ledger(tmp_path).runs(), metrics=None)
    (row,) = table.rows
    assert sorted(point.value for point in row.cells["heldout/loss"].points) == [2.0, 3.0]
    assert (row.trials, row.trials_completed, row.completed, row.runs_alone, row.last_repeat) == (2, 2, 4, 2, 2)
    assert (row.cost["train_seconds"], row.cost["peak_allocated_bytes"]) == (15.0, 20)
    assert table.not_alone == () and json.loads(json.dumps(row.to_json()))["runs_alone"] == 2


def test_what_a_cohort_shares_is_no_cost_of_a_setting_and_what_is_the_members_own_is(tmp_path: Path) -> None:
    together = as_member("c1", ["a", "b"], seats=2, wall=9.0)
    together["measurements"] |= {"train_seconds": 5.0, "train_peak_rss_bytes": 10**9, "adapter_file_bytes": 40}
    (row,) = settings_table([ended(tmp_path, trial_of(), **together)], metrics=None).rows
    assert row.cost == {"peak_allocated_bytes": 700_000_000, "optimizer_state_bytes": 800, "adapter_file_bytes": 40}
    assert not any(name.startswith("cohort_") for name in (*row.cost, *row.missing))
    assert row.missing["train_peak_rss_bytes"] == "no run was executed alone (1 of 1 trained in cohorts)"
    assert row.why_no_cost("step_seconds") == row.missing["train_seconds"]


def test_a_trial_that_failed_in_a_cohort_and_ended_alone_is_not_lost(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        together = as_member("c1", ["a"], seats=2, wall=9.0)
        failed = {"status": Status.OUT_OF_MEMORY} if seed == 2 else {"metrics": {"heldout/loss": loss(2.0 + seed)}}
        ended(tmp_path, trial_of(seed=seed), **together, **failed)
    ended(tmp_path, trial_of(seed=2), repeat=1, metrics={"heldout/loss": loss(4.0)}, facts=ALONE)
    table = settings_table(Ledger(tmp_path).runs(), metrics=None)
    (row,) = table.rows
    assert (row.trials, row.trials_completed, row.runs, row.completed) == (3, 3, 4, 3)
    best = answer_of(table, ()).best
    assert best is not None and (best.seeds, best.lost) == (3, 0)


def test_settings_without_a_run_made_alone_are_counted_for_time_and_for_memory(tmp_path: Path) -> None:
    """rank 2: peaks counted alone; rank 4: on CUDA, so no peak either, and repeat 1 was in a cohort again; rank 8 was
    alone; rank 16 has only failed."""
    for seed in (0, 1):
        ended(tmp_path, trial_of(rank=2, seed=seed), **as_member("c1", ["a"], seats=2, wall=9.0))
    for repeat in (0, 1):
        ended(tmp_path, trial_of(rank=4), repeat=repeat, **as_member("c2", ["b"], seats=2, wall=9.0, on_cpu=False))
    measured = {"train_seconds": 1.0, "peak_allocated_bytes": 5}
    ended(tmp_path, trial_of(rank=8), measurements=measured, facts=ALONE)
    ended(tmp_path, trial_of(rank=16), status=Status.FAILED, facts=ALONE)
    ended(tmp_path, trial_of(method={"kind": "base"}), name="base", facts=ALONE)
    table = settings_table(Ledger(tmp_path).runs(), metrics=None)
    time, memory = table.not_alone
    assert time.cost == "train_seconds" and set(time.settings) == {"lora-r2", "lora-r4"}
    assert (time.runs, time.of, time.repeat) == (4, 3, 2), "repeat 1 would find rank 4's done, and measure nothing"
    assert (memory.cost, memory.settings, memory.runs, memory.repeat) == ("peak_allocated_bytes", ("lora-r4",), 2, 2)
    assert table.to_json()["not_alone"][1]["settings"] == ["lora-r4"]


def test_times_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    records = [
        ended(tmp_path, trial_of(seed=seed), measurements={"train_seconds": 1.0}, facts=ALONE) for seed in (0, 1)
    ]
    path = records[1].folder / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine_id": "m2"}))
    (row,) = settings_table([records[0], read_record(records[1].folder)], metrics=None).rows
    assert "train_seconds" not in row.cost
    assert row.missing["train_seconds"] == "the runs come from 2 different machines"


def test_the_untouched_base_comes_first_and_has_one_point(tmp_path: Path) -> None:
    records = _seeds(tmp_path, [2.0, 2.1, 2.2])
    records.append(ended(tmp_path, trial_of(method={"kind": "base"}), name="base", metrics={"heldout/loss": loss(5.9)}))
    base, lora = settings_table(records, metrics=["heldout/loss"]).rows
    assert base.is_base and base.name == "base" and base.cells["heldout/loss"].points[0].seed is None
    assert not lora.is_base
    assert base.axes == {"method.kind": "base"}, "an untouched base has no rank"


def test_settings_of_one_name_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    records = [
        *_seeds(tmp_path, [2.0], learning_rate=0.001),
        *_seeds(tmp_path, [2.0], learning_rate=0.002),
        *_seeds(tmp_path, [2.0], rank=16),
        *_seeds(tmp_path, [2.0], learning_rate=0.002, optimizer={"kind": "sgd", "momentum": 0.9}),
    ]
    rows = settings_table(records, metrics=None).rows
    assert [row.name for row in rows] == [
        "lora-r8 learning_rate=0.001",
        "lora-r8 learning_rate=0.002 [" + rows[1].setting[:8] + "]",
        "lora-r16",
        "lora-r8 learning_rate=0.002 [" + rows[3].setting[:8] + "]",
    ]
    named = [
        *_seeds(tmp_path / "b", [2.0], optimizer={"kind": "adamw", "eps": 1e-8}),
        *_seeds(tmp_path / "b", [2.0], optimizer={"kind": "sgd", "eps": 1e-6}),
    ]
    assert [row.name for row in settings_table(named, metrics=None).rows] == [
        "lora-r8 optimizer=adamw",
        "lora-r8 optimizer=sgd",
    ]


def test_axes_are_the_keys_that_vary(tmp_path: Path) -> None:
    records = [*_seeds(tmp_path, [2.0, 2.1]), *_seeds(tmp_path, [2.0], rank=16, alpha=32.0)]
    first, second = settings_table(records, metrics=None).rows
    assert first.axes == {"rank": 8, "alpha": 16.0} and second.axes == {"rank": 16, "alpha": 32.0}


def test_numerics_versions_are_not_mixed(tmp_path: Path) -> None:
    records = _seeds(tmp_path, [2.0, 2.1])
    path = records[1].folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numerics_version": 7}))
    with pytest.raises(InputError, match="numerics versions 1 and 7"):
        settings_table([records[0], read_record(records[1].folder)], metrics=None)


def test_a_metric_that_means_two_things_is_refused(tmp_path: Path) -> None:
    records = [
        ended(tmp_path, trial_of(seed=0), metrics={"x": loss(2.0)}),
        ended(tmp_path, trial_of(seed=1), metrics={"x": loss(2.0, unit="bits/token")}),
    ]
    with pytest.raises(InputError, match="means different things"):
        settings_table(records, metrics=None)


def test_metrics_asked_for_are_the_columns_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    metrics = {"heldout/loss": loss(2.0), "skills/acc": loss(0.5, higher_is_better=True, chance=0.25)}
    records = [ended(tmp_path, trial_of(), metrics=metrics, missing={"late": "cut"})]
    table = settings_table(records, metrics=["skills/acc", "heldout/loss", "late"])
    assert [column.name for column in table.columns] == ["skills/acc", "heldout/loss"]
    assert table.columns[0].higher_is_better and table.columns[0].chance == 0.25
    with pytest.raises(InputError, match='"heldout/los"; did you mean "heldout/loss"'):
        settings_table(records, metrics=["heldout/los"])


def test_a_score_that_some_seeds_lack_says_why_when_all_lack_it(tmp_path: Path) -> None:
    records = [
        ended(tmp_path, trial_of(seed=0), metrics={"a": loss(1.0)}, missing={"b": "too long"}),
        ended(tmp_path, trial_of(seed=0, rank=4), metrics={"a": loss(1.0), "b": loss(2.0)}),
    ]
    first, second = settings_table(records, metrics=["a", "b"]).rows
    assert first.cells["b"].missing == "too long" and first.cells["b"].mean is None
    assert second.cells["b"].mean == 2.0


def test_a_table_of_nothing_completed_is_still_a_table(tmp_path: Path) -> None:
    records = [ended(tmp_path, trial_of(), status=Status.FAILED, reason="boom")]
    table = settings_table(records, metrics=["heldout/loss"])
    assert table.columns == () and table.rows[0].completed == 0
    assert settings_table([], metrics=["heldout/loss"]).rows == ()


def test_unreadable_runs_are_named_not_dropped(tmp_path: Path) -> None:
    records = _seeds(tmp_path, [2.0, 2.1])
    (records[0].folder / "trial.json").write_text("{")
    (records[1].folder / "result.json").write_text("{")
    table = settings_table([read_record(record.folder) for record in records], metrics=None)
    assert len(table.problems) == 2
    assert table.rows[0].statuses == {"DAMAGED": 1}


def test_json_is_strict_and_raw(tmp_path: Path) -> None:
    records = _seeds(tmp_path, [2.0, 2.2, 2.7])
    value = json.loads(json.dumps(settings_table(records, metrics=None).to_json(), allow_nan=False))
    (row,) = value["rows"]
    assert row["metrics"]["heldout/loss"]["interval"]["confidence"] == 0.95
    assert row["trainable_parameters"] == 1000 and row["predicted_peak_allocated_bytes"] is None
    assert value["metrics"] == [
        {"name": "heldout/loss", "unit": "nats/token", "higher_is_better": False, "chance": None}
    ]
