"""Learning curves: thinning by hand, bands against scipy, and logs that are partial, damaged or not there."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord, read_record
from lora_lab.record.step_log import StepLog
from lora_lab.study.curves import SettingCurve, run_curves, setting_curves
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import as_member, claim, ended, trial_of

LOSSES = [5.0, 4.0, 3.0, 2.5, 2.2, 2.0, 1.0]


def _logged(
    root: Path,
    losses: list[float],
    *,
    seed: int = 0,
    status: Status = Status.COMPLETED,
    repeat: int = 0,
    **changes: Any,
) -> RunRecord:
    record = ended(root, trial_of(seed=seed), repeat=repeat, status=status, **changes)
    _write(record.steps_path, losses)
    return record


def _write(path: Path, losses: list[float]) -> None:
    with StepLog(path) as log:
        for step, loss in enumerate(losses, start=1):
            values = {"loss": loss, "loss_tokens": step, "tokens": 10 * step, "seconds": 2.0, "gradient_norm": 1.0}
            log.write(step, values)


def _curve(records: list[RunRecord], key: str = "loss", points: int = 200) -> tuple[SettingCurve, list[str]]:
    curves, reasons = setting_curves(records, settings_table(records, metrics=None).rows, key, points)
    (curve,) = curves
    return curve, reasons


def test_a_short_run_is_its_log(tmp_path: Path) -> None:
    curve = run_curves(_logged(tmp_path, LOSSES), ("loss", "gradient_norm", "tokens_per_second", "allocated_bytes"))
    assert curve.series["loss"].steps == (1, 2, 3, 4, 5, 6, 7) and list(curve.series["loss"].values) == LOSSES
    assert curve.series["tokens_per_second"].values == tuple(5.0 * step for step in range(1, 8))
    assert "allocated_bytes" not in curve.series and curve.missing is None


def test_bins_are_equal_in_steps_and_weigh_losses_by_tokens(tmp_path: Path) -> None:
    """Three points of seven steps: bins 1-3, 4-6, 7. Loss tokens are 1, 2, 3, ...; tokens 10, 20, ... in 2 s each."""
    curve = run_curves(_logged(tmp_path, LOSSES), ("loss", "tokens_per_second", "gradient_norm"), points=3)
    series = curve.series["loss"]
    assert series.steps == (3, 6, 7)
    first = (5.0 * 1 + 4.0 * 2 + 3.0 * 3) / 6
    assert series.values == pytest.approx((first, (2.5 * 4 + 2.2 * 5 + 2.0 * 6) / 15, 1.0))
    assert series.values[0] != pytest.approx(4.0), "not the plain mean"
    assert curve.series["tokens_per_second"].values == pytest.approx((60 / 6, 150 / 6, 70 / 2))
    assert curve.series["gradient_norm"].values == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("steps", [1, 2, 199, 200, 201, 1000])
def test_never_more_points_than_asked_for_and_the_last_step_is_there(tmp_path: Path, steps: int) -> None:
    series = run_curves(_logged(tmp_path, [1.0] * steps), ("loss",), points=200).series["loss"]
    assert len(series.steps) <= 200 and series.steps[-1] == steps
    assert len(series.steps) > min(steps, 200) / 2


def test_the_band_is_the_t_interval_at_each_step(tmp_path: Path) -> None:
    seeds = [[3.0, 2.0], [3.3, 2.9], [3.1, 1.4], [3.7, 2.2]]
    curve, _ = _curve([_logged(tmp_path, losses, seed=seed) for seed, losses in enumerate(seeds)])
    assert curve.band == "interval" and curve.seeds == 4 and curve.low is not None and curve.high is not None
    for index in range(2):
        values = [losses[index] for losses in seeds]
        expected = stats.t.interval(0.95, 3, statistics.fmean(values), stats.sem(values))
        assert (curve.low[index], curve.high[index]) == pytest.approx(expected, rel=1e-12)
        assert curve.mean[index] == pytest.approx(statistics.fmean(values), rel=1e-12)


def test_two_seeds_have_their_range_and_one_has_no_band(tmp_path: Path) -> None:
    records = [_logged(tmp_path, losses, seed=seed) for seed, losses in enumerate([[3.0, 2.0], [2.0, 2.5]])]
    curve, _ = _curve(records)
    assert (curve.band, curve.low, curve.high, curve.mean) == ("range", (2.0, 2.0), (3.0, 2.5), (2.5, 2.25))
    curve, _ = _curve(records[:1])
    assert (curve.band, curve.low, curve.high, curve.mean) == (None, None, None, (3.0, 2.0))


def test_only_completed_seeds_and_steps_of_all_of_them_enter_the_mean(tmp_path: Path) -> None:
    records = [_logged(tmp_path, [3.0, 2.0, 1.0]), _logged(tmp_path, [3.0, 4.0], seed=1)]
    records.append(_logged(tmp_path, [9.0], seed=2, status=Status.DIVERGED))
    held = claim(Ledger(tmp_path), trial_of(seed=3))
    assert held is not None
    with held:
        _write(held.path / "steps.jsonl", [8.0])
        records.append(read_record(held.path))
    records.append(_logged(tmp_path, [7.0], seed=4, status=Status.FAILED))
    curve, reasons = _curve(records)
    assert (curve.steps, curve.mean, curve.seeds) == ((1, 2), (3.0, 3.0), 2)
    assert [run.state for run in curve.runs] == ["COMPLETED", "COMPLETED", "DIVERGED", "RUNNING"]
    assert reasons == ["lora-r8-s4: FAILED"]
    alone, _ = _curve(records[2:3])
    assert (alone.seeds, alone.mean, alone.band) == (0, (), None) and alone.runs[0].series["loss"].values == (9.0,)


def test_runs_of_different_lengths_are_thinned_into_the_same_bins(tmp_path: Path) -> None:
    """A diverged run is short, but its bins are those of the others; its last step is where it stopped."""
    full = _logged(tmp_path, [1.0] * 100)
    short = _logged(tmp_path, [1.0] * 25, seed=1, status=Status.DIVERGED)
    curve, _ = _curve([full, short], points=10)
    assert curve.runs[1].series["loss"].steps == (10, 20, 25) and curve.steps[:3] == (10, 20, 30)


def test_repeats_of_a_trial_count_once(tmp_path: Path) -> None:
    records = [_logged(tmp_path, [2.0], repeat=repeat) for repeat in range(3)]
    curve, _ = _curve(records)
    assert curve.seeds == 1 and curve.band is None


def test_a_value_that_is_not_finite_ends_the_curve_of_its_key(tmp_path: Path) -> None:
    record = _logged(tmp_path, [3.0, math.nan, 1.0])
    curve = run_curves(record, ("loss", "gradient_norm"))
    assert curve.series["loss"].steps == (1,) and curve.series["loss"].ended == "NaN at step 2"
    assert curve.series["gradient_norm"].steps == (1, 2, 3) and curve.series["gradient_norm"].ended is None
    record.steps_path.write_text(
        '{"step": 1, "loss": NaN, "loss_tokens": 1}\n{"step": 2, "loss": 1, "loss_tokens": 1}\n'
    )
    foreign = run_curves(record, ("loss",)).series["loss"]
    assert (foreign.steps, foreign.ended) == ((), "not finite at step 1")
    record.steps_path.write_text(f'{{"step": 1, "loss": 1{"0" * 400}, "loss_tokens": 1}}\n')
    assert run_curves(record, ("loss",)).series["loss"].ended == "not finite at step 1"


def test_numbers_too_large_for_a_spread_leave_their_step_out(tmp_path: Path) -> None:
    records = [_logged(tmp_path, [2.0, value], seed=seed) for seed, value in enumerate([1e300, -1e300, 1.0])]
    curve, _ = _curve(records)
    assert curve.steps == (1,) and len(curve.mean) == len(curve.low or ()) == len(curve.high or ()) == 1
    json.dumps(curve.to_json(), allow_nan=False)


def test_an_absent_value_is_absent_and_a_torn_last_line_is_no_damage(tmp_path: Path) -> None:
    record = _logged(tmp_path, [3.0, 2.0, 1.0])
    first, _, third, _ = record.steps_path.read_text().split("\n")
    without = '{"step": 2, "loss_tokens": 2, "gradient_norm": "high"}'
    record.steps_path.write_text("\n".join([first, without, third, '{"step": 4, "lo']))
    curve = run_curves(record, ("loss", "gradient_norm"))
    assert curve.series["loss"].steps == (1, 3) and curve.series["gradient_norm"].steps == (1, 3)


def _spoil_line(path: Path) -> None:
    path.write_text("{\n" + path.read_text())


def _spoil_step(path: Path) -> None:
    path.write_text('{"loss": 1.0, "loss_tokens": 1}\n')


def _spoil_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_spoil_line, "steps.jsonl:1: damaged line"),
        (_spoil_step, "steps.jsonl:1: expected a step, got None"),
        (_spoil_file, "Is a directory"),
        (Path.unlink, "no step was logged"),
        (lambda path: path.write_text(""), "no step was logged"),
    ],
)
def test_a_log_that_cannot_be_read_is_a_reason(tmp_path: Path, spoil: Any, reason: str) -> None:
    records = [_logged(tmp_path, [3.0, 2.0], seed=seed) for seed in (0, 1)]
    spoil(records[0].steps_path)
    curve = run_curves(records[0], ("loss",))
    assert reason in str(curve.missing) and curve.series == {}
    both, reasons = _curve(records)
    assert both.seeds == 1 and len(reasons) == 1 and reason in reasons[0] and reasons[0].startswith("lora-r8-s0: ")


def test_why_there_is_nothing_to_draw(tmp_path: Path) -> None:
    base = ended(tmp_path, trial_of(method={"kind": "base"}), name="base")
    assert run_curves(base, ("loss",)).missing == "nothing is trained"
    held = claim(Ledger(tmp_path), trial_of(seed=3))
    assert held is not None
    with held:
        assert run_curves(read_record(held.path), ("loss",)).missing == "no step has ended yet"
    records = [base, _logged(tmp_path, [1.0])]
    rows = settings_table(records, metrics=None).rows
    assert setting_curves(records, rows, "rss_bytes") == ([], ["lora-r8-s0: no rss_bytes in its step log"])
    json.dumps(run_curves(records[1], ("loss",)).to_json(), allow_nan=False)


def test_members_of_a_cohort_have_a_loss_and_no_speed_of_their_own(tmp_path: Path) -> None:
    """Nor has one that went on alone: its last steps have seconds, which are not all of it."""
    together = as_member("c1", ["a", "b"], seats=2, wall=9.0)
    records = [ended(tmp_path, trial_of(seed=seed), **together) for seed in (0, 1)]
    for record in records:
        with StepLog(record.steps_path) as log:
            for step in (1, 2):
                late = {"seconds": 2.0} if record is records[1] and step == 2 else {}
                log.write(step, {"loss": 3.0 - step, "loss_tokens": 1, "tokens": 10, **late})
    alone = _logged(tmp_path, [2.0, 1.0], seed=2, facts={"executed": "alone"})
    assert _curve([*records, alone])[0].seeds == 3
    curve, reasons = _curve([*records, alone], key="tokens_per_second")
    assert (curve.seeds, curve.mean) == (1, (5.0, 10.0))
    assert set(reasons) == {"runs trained in cohorts: no speed of their own"}


def test_a_speed_is_that_of_the_repeat_made_alone(tmp_path: Path) -> None:
    together = ended(tmp_path, trial_of(), **as_member("c1", ["a"], seats=2, wall=9.0))
    with StepLog(together.steps_path) as log:
        log.write(1, {"loss": 2.0, "loss_tokens": 1, "tokens": 10})
    alone = _logged(tmp_path, [2.0], repeat=1, facts={"executed": "alone"})
    curve, _ = _curve([together, alone], key="tokens_per_second")
    assert (curve.seeds, curve.mean) == (1, (5.0,))
    assert _curve([together, alone])[0].seeds == 1
