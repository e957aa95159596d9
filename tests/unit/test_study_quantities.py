"""Ratios of costs, and formulas over published, planned and measured numbers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_lab.record.study_points import StudyPoint
from lora_lab.study.verdict import Verdict
from tests.unit.judge_samples import TWO_ARMS, World, study_of

SLOWER = {
    "id": "slower",
    "statement": "b takes 1.5 times as long",
    "rule": "ratio",
    "measure": "train_seconds",
    "arm": "b",
    "against": "a",
    "low": 1.3,
    "high": 1.7,
}
TIMING = {"arms": ["a", "b"], "repeats": 3, "base": {}, "seed": 0}


def _when(minute: int) -> dict[str, Any]:
    hour, rest = divmod(minute, 60)
    at = f"2026-01-01T{hour:02}:{rest:02}"
    return {"started_at": f"{at}:00.000+00:00", "finished_at": f"{at}:50.000+00:00"}


def _timed(root: Path, *, in_turns: bool = True, repeats: int = 3, claim: Mapping[str, Any] = SLOWER) -> World:
    """Three repeats of each arm: b takes 1.5 times as long, and both slow down by a fifth with every repeat."""
    world = World(root, study_of(claim, timing=TIMING))
    for repeat in range(repeats):
        for place, kind in enumerate(("none", "nf4")):
            minute = 2 * repeat + place if in_turns else repeat + repeats * place
            world.run(
                {**world.study.base, "quantization": kind, "learning_rate": 2e-3, "seed": 0},
                stage="timing",
                repeat=repeat,
                measurements={
                    "train_seconds": 10
                    * 1.2**repeat
                    * (1.5 if place else 1.0)
                    * (1.01 if repeat == 1 and place else 1),
                    "load_average_before": 0.1 + repeat,
                },
                **_when(minute),
            )
    return world


def test_times_are_compared_by_repeat_on_the_logarithm(tmp_path: Path) -> None:
    verdict = _timed(tmp_path).verdict()
    logs = np.log([1.5, 1.5 * 1.01, 1.5])
    ends = np.exp(stats.t.interval(0.95, 2, logs.mean(), logs.std(ddof=1) / math.sqrt(3) * math.sqrt(1.5)))
    assert verdict.value == pytest.approx(stats.gmean([1.5, 1.515, 1.5]))
    assert (verdict.interval_low, verdict.interval_high) == pytest.approx(tuple(ends))
    assert (verdict.decision, verdict.word) == ("holds", "same direction")
    assert "3 repeats" in verdict.sentence
    assert verdict.notes == ("load average before the runs: 0.1 to 2.1",)


def test_times_of_cohorts_are_refused(tmp_path: Path) -> None:
    world = _timed(tmp_path)
    values = {**world.study.base, "quantization": "nf4", "learning_rate": 2e-3, "seed": 0}
    shutil.rmtree(tmp_path / "runs" / world.points[-1].run_id)
    world.points.pop()
    together = world.run(values, stage="timing", repeat=2, facts={"executed": "cohort"}, **_when(5))
    verdict = world.verdict()
    assert verdict.decision == "inconclusive" and verdict.value is None
    assert verdict.reasons == (
        f"run {together.run_id} (b) was trained together with others (executed: cohort), not alone",
    )


def test_a_deleted_repeat_and_too_few(tmp_path: Path) -> None:
    world = _timed(tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "runs" / world.points[0].run_id)
    assert f"run {world.points[0].run_id} (a) is not in the ledger" in world.verdict().reasons[0]
    few = _timed(tmp_path / "y", repeats=2)
    assert few.verdict().reasons == ("2 repeats, 3 are declared",)
    world.points = world.points[1:]
    assert world.verdict().reasons[0] == "the repeats do not pair: b has 0, 1, 2, a has 1, 2"


def test_times_of_arms_that_did_not_take_turns(tmp_path: Path) -> None:
    reasons = _timed(tmp_path, in_turns=False).verdict().reasons
    assert reasons == ("all runs of one arm were timed before the first of the other: b and a",)


def test_times_of_judged_runs_are_no_times(tmp_path: Path) -> None:
    world = World(tmp_path, study_of(SLOWER))
    for values in world.settings():
        world.run(values, measurements={"train_seconds": 5.0})
    assert world.verdict().reasons == (
        "train_seconds: times are taken from runs for the clock only, and the study has no timing",
    )
    other = World(tmp_path, study_of(SLOWER, timing=TIMING))
    other.points = world.points
    assert other.verdict().decision == "not run"


def _sizes(root: Path, values: Mapping[str, list[int]], *, high: float = 0.8) -> Verdict:
    claim = {**SLOWER, "measure": "peak_allocated_bytes", "low": None, "high": high}
    world = World(root, study_of(claim))
    for one in world.settings():
        size = values[str(one["quantization"])][int(str(one["seed"]))]
        world.run(one, measurements={"peak_allocated_bytes": size})
    return world.verdict()


def test_bytes_that_agree_are_compared_exactly(tmp_path: Path) -> None:
    verdict = _sizes(tmp_path, {"none": [4000] * 5, "nf4": [3000] * 5})
    assert (verdict.value, verdict.decision, verdict.confidence) == (0.75, "holds", None)
    assert "is 0.75 times" in verdict.sentence and "all runs agree" in verdict.sentence


def test_bytes_that_vary_have_an_interval(tmp_path: Path) -> None:
    sizes = {"none": [4000, 4100, 3900, 4050, 3950], "nf4": [3200, 3300, 3100, 3240, 3170]}
    verdict = _sizes(tmp_path, sizes)
    logs = np.log(np.array(sizes["nf4"]) / np.array(sizes["none"]))
    ends = np.exp(stats.t.interval(0.95, 4, logs.mean(), stats.sem(logs) * math.sqrt(5 / 4)))
    assert (verdict.interval_low, verdict.interval_high) == pytest.approx(tuple(ends))
    assert verdict.decision == "inconclusive"
    assert verdict.would_decide is not None and "seeds" in verdict.would_decide


def _exact(value: str, *, low: float | None = None, high: float | None = None, **changes: Any) -> dict[str, Any]:
    return {"id": "x", "statement": "s", "rule": "exact", "value": value, "low": low, "high": high, **changes}


def test_the_39_percent_are_50(tmp_path: Path) -> None:
    seconds = [("lora_s", 6685.75), ("nf4_s", 10059.53)]
    published = [{"id": name, "value": one, "unit": "s", "what": "w", "provenance": "p"} for name, one in seconds]
    claim = _exact("nf4_s / lora_s - 1", low=0.38, high=0.40, published=published)
    verdict = World(tmp_path, study_of(claim)).verdict()
    assert verdict.value == pytest.approx(3373.78 / 6685.75)
    assert verdict.value == pytest.approx(0.505, abs=0.0005)
    assert (verdict.decision, verdict.word) == ("fails", "contradicted")  # arithmetic is firm, at pocket scale too
    assert verdict.sentence.startswith(
        "Contradicted: 0.5046 where 0.38 to 0.4 is needed; it is nf4_s / lora_s - 1 with lora_s = 6685.75 s"
    )


def test_claims_without_runs_are_judged_at_every_scale(tmp_path: Path) -> None:
    claim = _exact("1 + 1", low=2, scales=["published"])
    assert World(tmp_path, study_of(claim)).verdict().word == "reproduced"


def test_a_formula_that_has_no_value(tmp_path: Path) -> None:
    verdict = World(tmp_path, study_of(_exact("1 / (2 - 2)", low=0))).verdict()
    assert verdict.decision == "inconclusive" and "divides by zero" in verdict.reasons[0]


def test_planned_numbers_are_those_of_the_published_design(tmp_path: Path) -> None:
    base = {"model": "llama2_7b", "data": "alpaca"}
    published = {**{key: TWO_ARMS[key] for key in ("seeds", "grids", "arms")}, "base": base}
    claim = _exact("planned(trainable_parameters, a) / 1e6", low=4.1, high=4.3)
    world = World(tmp_path, study_of(claim, published=published))
    assert world.verdict().decision == "not run"
    pocket, source = {**world.study.base, "learning_rate": 2e-3, "quantization": "none"}, {**base}
    world.points = [
        StudyPoint("planned", {**pocket, "seed": 0}, "p" * 16),
        StudyPoint("planned", {**source, "learning_rate": 2e-3, "quantization": "none", "seed": 0}, "q" * 16),
    ]
    world.planned = {"p" * 16: {"trainable_parameters": 460_800}, "q" * 16: {"trainable_parameters": 4_194_304}}
    verdict = world.verdict()
    assert verdict.value == pytest.approx(4.194304)
    assert (verdict.decision, verdict.arms[0].run_ids) == ("holds", ("q" * 16,))
    world.planned["q" * 16] = {"trainable_parameters": "needs the weights"}
    assert "needs the weights" in world.verdict().reasons[0]
    world.planned["q" * 16] = {"steps": 7}
    assert "no such number; there are steps" in world.verdict().reasons[0]


def test_measured_numbers_must_agree(tmp_path: Path) -> None:
    claim = _exact("measured(trainable_parameters, a) / measured(optimizer_state_bytes, b)", high=1)
    for name, sizes, decision in (("x", [800] * 5, "fails"), ("y", [800, 800, 800, 800, 808], "inconclusive")):
        world = World(tmp_path / name, study_of(claim))
        assert world.verdict().decision == "not run"
        for values in world.settings():
            world.run(values, measurements={"optimizer_state_bytes": sizes[int(str(values["seed"]))]})
        verdict = world.verdict()
        assert verdict.decision == decision
        if decision == "fails":
            assert verdict.value == 1.25
        else:
            assert "the runs of b do not agree (from 800 to 808)" in verdict.reasons[0]


def test_a_measurement_that_a_run_lacks(tmp_path: Path) -> None:
    world = World(tmp_path, study_of(_exact("measured(gradient_bytes, a)", high=1)))
    for values in world.settings():
        world.run(values, missing={"gradient_bytes": "only on CUDA"})
    reasons = world.verdict().reasons
    assert len(reasons) == 5 and "(a, seed 0) has no gradient_bytes: only on CUDA" in reasons[0]
