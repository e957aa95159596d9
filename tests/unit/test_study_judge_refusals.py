"""Every reason not to decide names the run, arm, seed or metric that it is about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_lab.errors import InputError
from lora_lab.record.result import Status
from lora_lab.record.study_points import StudyPoint
from tests.unit.judge_samples import LOWER, World, losses, study_of, two_arms

ACC = {**LOWER, "id": "acc", "metric": "t/acc", "claimed": "higher", "smallest_difference": 0.02}


def _runs(world: World, arm: str) -> list[str]:
    wanted = world.study.arms[arm]["quantization"]
    return [one.run_id for one in world.points if one.values["quantization"] == wanted and one.stage == "judged"]


def _file(world: World, run_id: str, name: str) -> Path:
    return world.root / "runs" / run_id / name


def test_a_deleted_run_turns_a_verdict_inconclusive(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    assert world.verdict().decision == "holds"
    gone = _runs(world, "b")[3]
    shutil.rmtree(tmp_path / "runs" / gone)
    verdict = world.verdict()
    assert verdict.decision == verdict.word == "inconclusive"
    assert verdict.estimate is None
    assert f"run {gone} (b, seed 3) is not in the ledger: never run, or deleted" in verdict.reasons
    assert gone in verdict.sentence


def test_no_run_at_all_is_not_run(tmp_path: Path) -> None:
    world = World(tmp_path, study_of(LOWER))
    assert world.verdict().decision == "not run"  # nothing was asked for
    for values in world.settings():
        world.point(values)
    verdict = world.verdict()
    assert verdict.decision == verdict.word == "not run"
    assert verdict.would_decide is not None and "lora-lab reproduce crafted" in verdict.would_decide


def test_fewer_seeds_than_the_claim_declares(tmp_path: Path) -> None:
    verdict = two_arms(tmp_path, {**LOWER, "seeds": 7}).verdict()
    assert verdict.decision == "inconclusive"
    assert "a has 5 of the 7 seeds needed" in verdict.reasons and "b has 5 of the 7 seeds needed" in verdict.reasons


def test_two_seeds_decide_nothing(tmp_path: Path) -> None:
    verdict = two_arms(tmp_path, seeds=[0, 1]).verdict()
    assert verdict.decision == "inconclusive"
    assert "a has 2 of the 3 seeds needed" in verdict.reasons


@pytest.mark.parametrize(
    ("status", "told"),
    [(Status.DIVERGED, "diverged: loss is nan"), (Status.FAILED, "ended as FAILED"), (Status.OUT_OF_MEMORY, "memory")],
)
def test_a_run_without_an_answer(tmp_path: Path, status: Status, told: str) -> None:
    world = World(tmp_path, study_of(LOWER))
    for values in world.settings():
        bad = values["quantization"] == "nf4" and values["seed"] == 2
        fields: dict[str, Any] = {"status": status, "reason": "loss is nan"} if bad else {}
        world.run(values, rows=losses(values["seed"], shift=0.3 if values["quantization"] == "nf4" else 0.0), **fields)
    verdict = world.verdict()
    assert verdict.decision == "inconclusive"
    assert any("(b, seed 2)" in reason and told in reason for reason in verdict.reasons)


def test_seeds_that_do_not_pair(tmp_path: Path) -> None:
    grids = [
        {"quantization": ["none"], "learning_rate": [2e-3], "seed": [0, 1, 2]},
        {"quantization": ["nf4"], "learning_rate": [2e-3], "seed": [0, 1, 3]},
    ]
    verdict = two_arms(tmp_path, seeds=[], grids=grids).verdict()
    assert verdict.decision == "inconclusive"
    assert verdict.reasons == ("the seeds do not pair: a has 0, 1, 2, b has 0, 1, 3",)


def test_a_point_whose_run_has_another_seed(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    place = next(i for i, one in enumerate(world.points) if one.values["quantization"] == "nf4")
    other = world.points[place + 1].run_id
    world.points[place] = StudyPoint("judged", world.points[place].values, other)
    verdict = world.verdict()
    assert f"run {other} (b, seed 0) was made with seed 1" in verdict.reasons


def test_a_missing_point_of_a_seed(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    world.points = [one for one in world.points if (one.values["quantization"], one.values["seed"]) != ("nf4", 4)]
    assert "b has no run with seed 4" in world.verdict().reasons


def test_runs_scored_on_different_examples(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    odd = _runs(world, "b")[1]
    lines = _file(world, odd, "eval/heldout.jsonl").read_text().splitlines()
    changed = json.loads(lines[5]) | {"index": 99}
    _file(world, odd, "eval/heldout.jsonl").write_text("\n".join([*lines[:5], json.dumps(changed), *lines[6:]]) + "\n")
    verdict = world.verdict()
    assert verdict.decision == "inconclusive"
    assert len(verdict.reasons) == 1
    assert f"run {odd} (b, seed 1) were scored on different examples of heldout/loss" in verdict.reasons[0]
    assert "47 in common" in verdict.reasons[0]


def test_held_out_rows_of_another_seed_of_the_data(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    odd = _runs(world, "a")[2]
    header = json.loads(_file(world, odd, "trial.json").read_text())
    header["trial"]["data"]["heldout_seed"] = 10
    _file(world, odd, "trial.json").write_text(json.dumps(header))
    reasons = world.verdict().reasons
    assert len(reasons) == 1 and odd in reasons[0] and "data.heldout_seed" in reasons[0]


def test_other_loss_tokens_of_equal_rows(tmp_path: Path) -> None:
    world = World(tmp_path, study_of(LOWER))
    for values in world.settings():
        nats, tokens = losses(values["seed"], shift=0.0)
        more = 1.0 if values["quantization"] == "nf4" and values["seed"] == 4 else 0.0
        world.run(values, rows=(nats, tokens + more))
    reasons = world.verdict().reasons
    assert len(reasons) == 1 and "(b, seed 4) have different loss tokens" in reasons[0]


def test_a_result_that_does_not_follow_from_its_examples(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    odd = _runs(world, "b")[0]
    result = json.loads(_file(world, odd, "result.json").read_text())
    result["metrics"]["heldout/loss"]["value"] -= 0.4
    _file(world, odd, "result.json").write_text(json.dumps(result))
    reasons = world.verdict().reasons
    assert len(reasons) == 1 and "its examples give heldout/loss" in reasons[0] and odd in reasons[0]


def test_rows_that_are_gone_and_a_metric_that_no_run_has(tmp_path: Path) -> None:
    world = two_arms(tmp_path, LOWER, {**LOWER, "id": "other", "metric": "t/acc"})
    odd = _runs(world, "a")[4]
    _file(world, odd, "eval/heldout.jsonl").unlink()
    rows, other = world.verdicts()
    assert rows.reasons == (f"run {odd} (a, seed 4) has no held-out rows",)
    assert len(other.reasons) == 10 and "has no t/acc: not scored" in other.reasons[0]


def test_other_numerics(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    odd = _runs(world, "b")[2]
    result = json.loads(_file(world, odd, "result.json").read_text())
    result["numerics_version"] += 1
    _file(world, odd, "result.json").write_text(json.dumps(result))
    assert any("different numerics versions" in reason and odd in reason for reason in world.verdict().reasons)


@pytest.mark.parametrize(("level", "word"), [(0.25, "floor"), (1.0, "ceiling")])
def test_floor_and_ceiling(tmp_path: Path, level: float, word: str) -> None:
    world = World(tmp_path, study_of(ACC))
    for place, values in enumerate(world.settings()):
        right = (np.random.default_rng(place).random(100) < level).astype(float)
        world.run(values, samples={"t": right.tolist()})
    verdict = world.verdict()
    assert verdict.decision == "inconclusive"
    assert any(reason.startswith(f"{word}: no arm's t/acc") for reason in verdict.reasons)
    assert verdict.estimate is not None  # the number stays, the decision does not


def test_exact_match_has_chance_zero(tmp_path: Path) -> None:
    world = World(tmp_path, study_of(ACC))
    for values in world.settings():
        world.run(values, samples={"t": [1.0] + [0.0] * 99}, chance=None)
    assert world.verdict().reasons == ("floor: no arm's t/acc is 3 standard errors above chance, 0 (a 0.01, b 0.01)",)


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ({"a": {}, "b": {"quantization": "nf4"}}, "picks 2 settings (quantization=none; quantization=nf4)"),
        ({"a": {"quantization": "int8"}, "b": {"quantization": "nf4"}}, "the nearest has quantization=none"),
    ],
)
def test_an_arm_is_one_setting(tmp_path: Path, arms: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        World(tmp_path, study_of(LOWER, arms=arms)).verdict()
    assert told in str(caught.value)


def test_a_claim_that_cannot_be_run_says_why(tmp_path: Path) -> None:
    claim = {"id": "n", "statement": "s", "rule": "not_runnable", "reason": "needs a judge model"}
    verdict = World(tmp_path, study_of(claim)).verdict()
    assert (verdict.decision, verdict.sentence) == ("not runnable", "Not runnable: needs a judge model.")


def test_a_rise_with_a_dent_is_left_open(tmp_path: Path) -> None:
    kinds = dict(zip(("none", "nf4", "fp4"), (0.0, 0.8, 0.74), strict=True))
    arms = {name: {"quantization": kind} for name, kind in zip("abc", kinds, strict=True)}
    claim = {"id": "up", "statement": "s", "metric": "heldout/loss", "rule": "monotone", "arms": ["a", "b", "c"]}
    up = {**claim, "claimed": "higher", "smallest_difference": 0.05}
    grids = [{"quantization": list(kinds), "learning_rate": [2e-3]}]
    world = World(tmp_path, study_of(up, grids=grids, arms=arms))
    for values in world.settings():
        world.run(values, rows=losses(values["seed"], shift=kinds[values["quantization"]], spread=0.02))
    verdict = world.verdict()
    assert verdict.decision == "inconclusive"
    assert verdict.interval_low is not None and verdict.interval_low > 0.05  # the rise by itself would hold
    assert "but a step goes back: c - b is -0.0" in verdict.sentence
    assert verdict.would_decide is not None and verdict.would_decide.startswith("of c - b, ")
