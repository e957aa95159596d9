"""Rates that tuning picked, what would decide, and which setting an arm is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_lab.errors import InputError
from lora_lab.record.result import Status
from lora_lab.study.arms import arm_setting
from lora_lab.study.estimate import Estimate
from lora_lab.study.needed import examples_needed, seeds_needed, what_decides
from tests.unit.judge_samples import LOWER, World, losses, study_of

RATES = (1e-3, 2e-3, 4e-3)
TUNED: dict[str, Any] = {
    "grids": [{"quantization": ["none", "nf4"], "learning_rate": [2e-3, "tuned"]}],
    "tuning": {"metric": "heldout/loss", "seeds": [100], "base": {}, "rates": [{"values": list(RATES)}]},
}
BOTH = {**LOWER, "forms": ["as_published", "tuned"]}


def _tuned(root: Path, *, best: float = 2e-3, judged: float = 2e-3, **changes: Any) -> World:
    """Every rate was tried on seed 100; the loss is least at `best`; what was judged ran at `judged`."""
    world = World(root, study_of(BOTH, **{**TUNED, **changes}))
    for values in world.settings():
        shift = 0.3 if values["quantization"] == "nf4" else 0.0
        if values["learning_rate"] != "tuned":
            world.run(values, rows=losses(values["seed"], shift=shift))
            continue
        world.run(values, rows=losses(values["seed"], shift=shift), rate=judged)
        if values["seed"] == 0:
            for rate in RATES:
                rows = losses(100, shift=shift + abs(np.log2(rate / best)))
                world.run({**values, "seed": 100}, rows=rows, stage="tuning", rate=rate)
    return world


def _tuning_run(world: World, kind: str, rate: float) -> str:
    return next(
        one.run_id
        for one in world.points
        if one.stage == "tuning" and one.values["quantization"] == kind and one.rate == rate
    )


def test_both_forms_are_judged_and_tell_their_rates(tmp_path: Path) -> None:
    published, tuned = _tuned(tmp_path).verdicts()
    assert [(one.form, one.decision) for one in (published, tuned)] == [("as_published", "holds"), ("tuned", "holds")]
    assert [arm.rate for arm in published.arms] == [None, None]
    assert [arm.rate for arm in tuned.arms] == [2e-3, 2e-3]


@pytest.mark.parametrize(("rate", "word"), [(1e-3, "smallest"), (4e-3, "largest")])
def test_a_rate_at_the_edge_of_its_grid(tmp_path: Path, rate: float, word: str) -> None:
    published, tuned = _tuned(tmp_path, best=rate, judged=rate).verdicts()
    assert published.decision == "holds"
    assert tuned.decision == "inconclusive"
    assert f"a: picked rate {rate} is the {word} tried; extend the grid" in tuned.reasons
    assert tuned.estimate is not None  # the number stays


def test_another_rate_than_the_tuning_runs_pick(tmp_path: Path) -> None:
    _, tuned = _tuned(tmp_path, best=2e-3, judged=3e-3).verdicts()
    assert "a: the tuning runs pick the rate 0.002, judged was 0.003" in tuned.reasons


def test_a_deleted_tuning_run(tmp_path: Path) -> None:
    world = _tuned(tmp_path)
    gone = _tuning_run(world, "nf4", 4e-3)
    shutil.rmtree(tmp_path / "runs" / gone)
    published, tuned = world.verdicts()
    assert published.decision == "holds" and tuned.decision == "inconclusive"
    assert len(tuned.reasons) == 1
    assert f"run {gone} (tuning b at 0.004, seed 100) is not in the ledger" in tuned.reasons[0]


def test_a_tuning_run_that_diverged_is_an_answer(tmp_path: Path) -> None:
    world = _tuned(tmp_path)
    for kind in ("none", "nf4"):
        shutil.rmtree(tmp_path / "runs" / _tuning_run(world, kind, 4e-3))
    points, world.points = world.points, []
    for one in points:
        if one.stage == "tuning" and one.rate == 4e-3:
            world.run(one.values, stage="tuning", rate=4e-3, status=Status.DIVERGED, reason="loss is nan")
        else:
            world.points.append(one)
    assert [one.decision for one in world.verdicts()] == ["holds", "holds"]


def test_no_rate_picked_yet(tmp_path: Path) -> None:
    world = _tuned(tmp_path)
    world.points = [one for one in world.points if one.stage == "tuning" or one.rate is None]
    published, tuned = world.verdicts()
    assert published.decision == "holds" and tuned.decision == "not run"
    assert tuned.reasons == ("tuning has picked no rate for a yet", "tuning has picked no rate for b yet")


def test_no_tuning_run_listed(tmp_path: Path) -> None:
    world = _tuned(tmp_path)
    world.points = [one for one in world.points if one.stage != "tuning"]
    _, tuned = world.verdicts()
    assert "a: no tuning run is listed, so its rate cannot be picked again" in tuned.reasons


def test_an_arm_has_a_setting_in_each_form() -> None:
    study = study_of(BOTH, **TUNED)
    assert arm_setting(study, "b", "as_published")["learning_rate"] == 2e-3
    assert arm_setting(study, "b", "tuned")["learning_rate"] == "tuned"
    with pytest.raises(InputError, match="the form tuned needs a setting with learning_rate: tuned"):
        arm_setting(study_of(BOTH), "b", "tuned")
    with pytest.raises(InputError, match='no arm "c"'):
        arm_setting(study, "c", "tuned")


def test_lists_are_compared_as_they_are_written() -> None:
    grids = [{"target": [["q_proj"], ["q_proj", "v_proj"]], "learning_rate": [2e-3]}]
    arms = {"a": {"target": ["q_proj"]}, "b": {"target": ["q_proj", "v_proj"]}}
    study = study_of(LOWER, grids=grids, arms=arms)
    assert arm_setting(study, "b", "as_published")["target"] == ("q_proj", "v_proj")


def test_the_seeds_that_would_decide_are_the_fewest() -> None:
    spread, gap = 0.09, 0.02
    now = Estimate(0.07, spread / 5**0.5, 4.0, spread**2 / 5, None, 5, 0)
    found = seeds_needed(now, 0.95, gap)
    assert found is not None
    widths = [stats.t.ppf(0.975, n - 1) * spread / n**0.5 for n in (found - 1, found)]
    assert widths[1] < gap <= widths[0]


def test_more_seeds_do_not_help_against_the_examples() -> None:
    now = Estimate(0.07, 0.03, 16.0, 1e-8, 9e-4, 5, 64)
    assert seeds_needed(now, 0.95, 0.02) is None
    found = examples_needed(now, 0.95, 0.02)
    assert found is not None
    # 2.12 standard errors of 0.03 at 64 examples must come below 0.02: at 64 (2.12 * 0.03 / 0.02)^2 = 647.
    assert 640 <= found <= 720
    assert what_decides(now, 0.95, [0.05], unit="seed").endswith(f"about {found} examples in place of 64")
