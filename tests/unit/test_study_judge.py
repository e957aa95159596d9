"""Verdicts on crafted ledgers, held against plain numpy and scipy; and every reason not to decide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_lab.errors import InputError
from lora_lab.record.result import Status
from lora_lab.record.study_points import StudyPoint
from lora_lab.study.verdict import verdict_from_json
from tests.unit.judge_samples import LOWER, TWO_ARMS, World, losses, study_of, two_arms

ACC = {**LOWER, "id": "acc", "metric": "t/acc", "claimed": "higher", "smallest_difference": 0.02}


def _runs(world: World, arm: str) -> list[str]:
    wanted = world.study.arms[arm]["quantization"]
    return [one.run_id for one in world.points if one.values["quantization"] == wanted and one.stage == "judged"]


def _file(world: World, run_id: str, name: str) -> Path:
    return world.root / "runs" / run_id / name


def test_loss_per_token_is_what_plain_numpy_makes_of_the_rows(tmp_path: Path) -> None:
    verdict = two_arms(tmp_path).verdict()
    a = np.array([losses(seed, shift=0.0)[0] for seed in range(5)])
    b = np.array([losses(seed, shift=0.3)[0] for seed in range(5)])
    tokens = losses(0, shift=0.0)[1]
    assert verdict.estimate is not None
    ratio = (a - b).sum() / (5 * tokens.sum())
    assert verdict.estimate.difference == pytest.approx(ratio, rel=1e-12)
    assert ratio == pytest.approx(-0.3, abs=0.05)
    # The seed part by itself: the variance of the mean over seeds, from one ratio per seed, times S / (S - 1).
    by_seed = (a - b).sum(axis=1) / tokens.sum()
    assert verdict.estimate.seed_part == pytest.approx(by_seed.var(ddof=1) / 5 * 5 / 4, rel=1e-6)
    low, high = stats.t.interval(0.95, verdict.estimate.degrees_of_freedom, ratio, verdict.estimate.standard_error)
    assert (verdict.interval_low, verdict.interval_high) == pytest.approx((low, high))
    assert (verdict.decision, verdict.word) == ("holds", "same direction")
    assert {arm.name: round(arm.value or 0, 6) for arm in verdict.arms} == {
        "a": round(a.sum() / (5 * tokens.sum()), 6),
        "b": round(b.sum() / (5 * tokens.sum()), 6),
    }


def test_accuracy_of_samples_is_what_plain_numpy_makes_of_them(tmp_path: Path) -> None:
    world = World(tmp_path, study_of(ACC))
    draw = np.random.default_rng(1)
    hard = draw.random(200)
    scores: dict[str, list[np.ndarray]] = {"none": [], "nf4": []}
    for values in world.settings():
        right = (draw.random(200) < (0.8 if values["quantization"] == "none" else 0.5) - 0.2 * hard).astype(float)
        scores[values["quantization"]].append(right)
        world.run(values, samples={"t": right.tolist()})
    verdict = world.verdict()
    d = np.array(scores["none"]) - np.array(scores["nf4"])
    assert verdict.estimate is not None
    assert verdict.estimate.difference == pytest.approx(d.mean(), rel=1e-12)
    assert verdict.estimate.seed_part is not None and verdict.estimate.example_part is not None
    # Mean squares of the two-way table, by their definition; four pseudo-examples of size 1 on top.
    residual = d - d.mean(axis=1, keepdims=True) - d.mean(axis=0, keepdims=True) + d.mean()
    rest = (residual**2).sum() / (4 * 199)
    of_examples = 5 * ((d.mean(axis=0) - d.mean()) ** 2).sum() / 199
    of_seeds = 200 * ((d.mean(axis=1) - d.mean()) ** 2).sum() / 4
    assert verdict.estimate.example_part == pytest.approx(max(of_examples - rest, 0) / 1000 + 4 / 200**2)
    assert verdict.estimate.seed_part == pytest.approx(max(of_seeds * 5 / 4, rest) / 1000)
    assert verdict.decision == "holds"
    assert "5 seeds, 200 examples" in verdict.sentence


def test_the_order_of_examples_in_a_file_is_nothing(tmp_path: Path) -> None:
    plain = two_arms(tmp_path / "plain").verdict()
    world = World(tmp_path / "mixed", study_of(LOWER))
    for place, values in enumerate(world.settings()):
        rows = losses(values["seed"], shift=0.3 if values["quantization"] == "nf4" else 0.0)
        world.run(values, rows=rows, order=np.random.default_rng(place).permutation(48).tolist())
    mixed = world.verdict()
    assert mixed.estimate is not None and plain.estimate is not None
    assert mixed.estimate.standard_error == pytest.approx(plain.estimate.standard_error, rel=1e-12)
    assert mixed.estimate.difference == pytest.approx(plain.estimate.difference, rel=1e-12)


def test_samples_are_matched_by_hash_and_equal_texts_by_their_order(tmp_path: Path) -> None:
    world = World(tmp_path, study_of(ACC, seeds=[0, 1, 2]))
    draw = np.random.default_rng(3)
    d = []
    for values in world.settings():
        right = (draw.random(50) < 0.6).astype(float)
        # Documents 1 and 2 have equal texts, so they keep their order; the others change places.
        order = [*range(49, 2, -1), 1, 2, 0] if values["quantization"] == "nf4" else None
        world.run(values, samples={"t": right.tolist()}, order=order)
        d.append(right if values["quantization"] == "none" else -right)
    verdict = world.verdict()
    table = np.array(d).reshape(2, 3, 50).sum(axis=0)
    assert verdict.estimate is not None
    by_example = table.mean(axis=0)
    rest = (table - by_example - table.mean(axis=1, keepdims=True) + table.mean()) ** 2
    part = max(by_example.var(ddof=1) / 50 - rest.sum() / (2 * 49) / 150, 0) + 4 / 50**2
    assert verdict.estimate.example_part == pytest.approx(part)


@pytest.mark.parametrize(
    ("shift", "decision", "word"),
    [(0.3, "holds", "same direction"), (-0.3, "fails", "opposite direction"), (0.05, "inconclusive", "inconclusive")],
)
def test_pocket_words(tmp_path: Path, shift: float, decision: str, word: str) -> None:
    verdict = two_arms(tmp_path, shift=shift).verdict()
    assert (verdict.decision, verdict.word) == (decision, word)
    assert "on SmolLM2-135M-Instruct, skills" in verdict.sentence
    assert verdict.sentence.lower().startswith(word)
    assert "reproduced" not in verdict.sentence.lower() and "contradicted" not in verdict.sentence.lower()


@pytest.mark.parametrize(("shift", "word"), [(0.3, "reproduced"), (-0.3, "contradicted"), (0.05, "inconclusive")])
def test_published_words(tmp_path: Path, shift: float, word: str) -> None:
    design = {key: TWO_ARMS[key] for key in ("base", "seeds", "grids", "arms")}
    world = World(tmp_path, study_of(LOWER, published=design), scale="published")
    for values in world.settings():
        world.run(values, rows=losses(values["seed"], shift=shift if values["quantization"] == "nf4" else 0.0))
    verdict = world.verdict()
    assert (verdict.word, verdict.scale) == (word, "published")


def test_an_inconclusive_interval_says_how_many_seeds_would_decide(tmp_path: Path) -> None:
    verdict = two_arms(tmp_path, shift=0.075).verdict()
    assert verdict.decision == "inconclusive" and verdict.reasons == ()
    assert verdict.interval_low is not None and verdict.interval_high is not None
    assert verdict.interval_low < -0.05 < verdict.interval_high
    assert "both sides" in verdict.sentence
    assert verdict.would_decide is not None and "seeds in place of 5" in verdict.would_decide


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
    loss, other = world.verdicts()
    assert loss.reasons == (f"run {odd} (a, seed 4) has no held-out rows",)
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


def test_untrained_arms_have_no_seed_part(tmp_path: Path) -> None:
    grids = [{"method": ["base"], "quantization": ["none", "nf4"]}]
    world = World(tmp_path, study_of({**LOWER, "smallest_difference": 0.01}, grids=grids))
    for values in world.settings():
        world.run(values, rows=losses(0, shift=0.3 if values["quantization"] == "nf4" else 0.0))
    verdict = world.verdict()
    nats = losses(0, shift=0.0)[0] - losses(0, shift=0.3)[0]
    tokens = losses(0, shift=0.0)[1]
    ratio = nats.sum() / tokens.sum()
    error = np.sqrt(48 / 47 * ((nats - ratio * tokens) ** 2).sum()) / tokens.sum()  # Cochran 1977, section 6.4
    assert verdict.estimate is not None
    assert verdict.estimate.seed_part is None and verdict.estimate.seeds == 0
    assert verdict.estimate.difference == pytest.approx(ratio)
    assert verdict.estimate.standard_error == pytest.approx(error)
    assert [len(arm.run_ids) for arm in verdict.arms] == [1, 1]
    assert verdict.decision == "holds"


def test_a_trained_arm_against_the_untouched_base(tmp_path: Path) -> None:
    grids = [{"quantization": ["none"], "learning_rate": [2e-3]}, {"method": ["base"], "quantization": ["nf4"]}]
    verdict = two_arms(tmp_path, grids=grids).verdict()
    assert verdict.decision == "holds"
    assert verdict.estimate is not None and verdict.estimate.seeds == 5
    assert [arm.seeds for arm in verdict.arms] == [5, 0]


def test_equality_monotone_and_best_of(tmp_path: Path) -> None:
    kinds = ["none", "nf4", "fp4", "int8"]
    arms = {name: {"quantization": kind} for name, kind in zip("abcd", kinds, strict=True)}
    common = {"statement": "s", "metric": "heldout/loss"}
    claims = [
        {**common, "id": "same", "rule": "equality", "arm": "a", "against": "b", "margin": 0.10},
        {**common, "id": "apart", "rule": "equality", "arm": "a", "against": ["c", "d"], "margin": 0.10},
        {**common, "id": "up", "rule": "monotone", "arms": ["b", "c", "d"], "claimed": "higher"},
        {**common, "id": "zigzag", "rule": "monotone", "arms": ["b", "d", "c"], "claimed": "higher"},
        {**common, "id": "best", "rule": "best_of", "arms": ["a", "c", "d"], "best": "a", "claimed": "lower"},
        {**common, "id": "worst", "rule": "best_of", "arms": ["a", "c", "d"], "best": "d", "claimed": "lower"},
    ]
    claims[2:] = [{**one, "smallest_difference": 0.05} for one in claims[2:]]
    grids = [{"quantization": kinds, "learning_rate": [2e-3]}]
    world = World(tmp_path, study_of(*claims, grids=grids, arms=arms))
    shifts = dict(zip(kinds, (0.0, 0.001, 0.4, 0.8), strict=True))
    for values in world.settings():
        world.run(values, rows=losses(values["seed"], shift=shifts[values["quantization"]], spread=0.02))
    found = {one.claim: one for one in world.verdicts()}
    decisions = {name: one.decision for name, one in found.items()}
    assert decisions == {
        "same": "holds",
        "apart": "fails",
        "up": "holds",
        "zigzag": "fails",
        "best": "holds",
        "worst": "fails",
    }
    assert found["same"].confidence == pytest.approx(0.90)
    assert found["up"].estimate is not None and found["up"].estimate.difference == pytest.approx(0.8, abs=0.05)
    assert found["apart"].estimate is not None and found["apart"].estimate.difference == pytest.approx(-0.6, abs=0.05)
    assert len(found["best"].contrasts) == 2 and len(found["up"].contrasts) == 3
    assert "that of c, the closest of the others" in found["best"].sentence


def test_a_family_widens_every_interval(tmp_path: Path) -> None:
    claims = [{**LOWER, "id": f"c{n}", "family": "f"} for n in range(5)]
    equal = {"id": "e", "statement": "s", "rule": "equality", "metric": "heldout/loss", "arm": "a", "against": "b"}
    world = two_arms(tmp_path, *claims[:4], {**equal, "margin": 0.1, "family": "f"}, LOWER)
    *family, last, alone = world.verdicts()
    assert [one.confidence for one in family] == pytest.approx([0.99] * 4)
    assert last.confidence == pytest.approx(0.98)
    assert alone.confidence == pytest.approx(0.95)
    assert family[0].interval_low is not None and alone.interval_low is not None
    assert family[0].interval_low < alone.interval_low


def test_conjunctions(tmp_path: Path) -> None:
    higher = {**LOWER, "id": "higher", "claimed": "higher"}
    wide = {**LOWER, "id": "wide", "smallest_difference": 0.3}
    parts = [("both", ["lower", "lower2"]), ("one", ["lower", "higher"]), ("open", ["lower", "wide"])]
    joined = [{"id": name, "statement": "s", "rule": "conjunction", "parts": of} for name, of in parts]
    world = two_arms(tmp_path, *joined, LOWER, {**LOWER, "id": "lower2"}, higher, wide)
    found = {one.claim: one for one in world.verdicts()}
    assert [one.claim for one in world.verdicts()][:3] == ["both", "one", "open"]  # in the order of the file
    assert (found["both"].decision, found["both"].word) == ("holds", "same direction")
    assert (found["one"].decision, found["one"].word) == ("fails", "opposite direction")
    assert found["wide"].decision == "inconclusive" and found["open"].decision == "inconclusive"
    assert any("wide is inconclusive" in reason for reason in found["open"].reasons)
    shutil.rmtree(tmp_path / "runs")
    assert {one.decision for one in world.verdicts()} == {"not run"}


def test_a_claim_that_cannot_be_run_says_why(tmp_path: Path) -> None:
    claim = {"id": "n", "statement": "s", "rule": "not_runnable", "reason": "needs a judge model"}
    verdict = World(tmp_path, study_of(claim)).verdict()
    assert (verdict.decision, verdict.sentence) == ("not runnable", "Not runnable: needs a judge model.")


def test_a_later_look_is_judged_on_its_seeds_alone(tmp_path: Path) -> None:
    world = two_arms(tmp_path, shift=0.3)
    fresh = [{**values, "seed": values["seed"] + 5} for values in world.settings()]
    assert world.verdict(seeds=(5, 6, 7, 8, 9)).decision == "not run"
    for values in fresh:
        world.run(values, rows=losses(values["seed"], shift=-0.3 if values["quantization"] == "nf4" else 0.0))
    assert world.verdict().decision == "holds"
    later = world.verdict(seeds=(5, 6, 7, 8, 9))
    assert later.decision == "fails"
    assert later.estimate is not None and later.estimate.difference == pytest.approx(0.3, abs=0.05)
    assert "a has 3 of the 5 seeds needed" in world.verdict(seeds=(5, 6, 7)).reasons


def test_runs_from_before_the_criteria_are_counted(tmp_path: Path) -> None:
    world = two_arms(tmp_path)
    ends = "2026-01-01T00:01:00.000+00:00"
    assert not world.verdict(registered_at=ends).notes
    verdict = world.verdict(registered_at="2026-01-01T00:01:00.001+00:00")
    assert "10 of 10 runs had ended before the criteria were fixed" in verdict.notes
    assert "10 of 10 runs had ended before the criteria were fixed" in verdict.sentence


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


def test_verdicts_survive_json(tmp_path: Path) -> None:
    claim = {"id": "x", "statement": "s", "rule": "exact", "value": "1 + 1", "low": 2}
    for verdict in two_arms(tmp_path, LOWER, claim, {**LOWER, "id": "l", "seeds": 9}).verdicts():
        assert verdict_from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
