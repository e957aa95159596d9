"""Verdicts on crafted ledgers, held against plain numpy and scipy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_lab.study.verdict import verdict_from_json
from tests.unit.judge_samples import LOWER, TWO_ARMS, World, losses, study_of, two_arms, write_lines
from tests.unit.ledger_samples import loss

ACC = {**LOWER, "id": "acc", "metric": "t/acc", "claimed": "higher", "smallest_difference": 0.02}


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


def test_bits_per_byte_of_untrained_arms_are_compared_over_documents(tmp_path: Path) -> None:
    grids = [{"method": ["base"], "quantization": ["none", "nf4"]}]
    claim = {**LOWER, "metric": "p/bits_per_byte", "smallest_difference": 0.01}
    world = World(tmp_path, study_of(claim, grids=grids, seeds=[]))
    sizes = np.random.default_rng(0).integers(500, 900, size=30).astype(float)
    nats = {"none": -0.7 * sizes, "nf4": -0.75 * sizes + 20 * np.random.default_rng(1).standard_normal(30)}
    for values in world.settings():
        mine = nats[values["quantization"]]
        value = float(-mine.sum() / sizes.sum() / np.log(2))
        metric = loss(value, unit="bits/byte")
        record = world.run(values, metrics={"p/bits_per_byte": metric})
        lines = [
            {
                "doc_id": n,
                "doc_hash": f"h{n}",
                "filter": "none",
                "metrics": ["bits_per_byte"],
                "bits_per_byte": [x, size],
            }
            for n, (x, size) in enumerate(zip(mine.tolist(), sizes.tolist(), strict=True))
        ]
        write_lines(record.eval_folder / "samples_p.jsonl", lines)
    verdict = world.verdict()
    bits = (nats["nf4"] - nats["none"]) / np.log(2)  # of none - nf4, whose log-likelihoods are negative
    ratio = bits.sum() / sizes.sum()
    error = np.sqrt(30 / 29 * ((bits - ratio * sizes) ** 2).sum()) / sizes.sum()
    assert verdict.estimate is not None
    assert verdict.estimate.difference == pytest.approx(ratio)
    assert verdict.estimate.standard_error == pytest.approx(error)
    assert (verdict.unit, verdict.decision, verdict.estimate.examples) == ("bits/byte", "holds", 30)


def test_a_number_per_run_is_judged_over_seeds_only(tmp_path: Path) -> None:
    claim = {**LOWER, "metric": "train/loss"}
    world = World(tmp_path, study_of(claim))
    values_of = {"none": [2.0, 2.1, 1.9, 2.05, 1.95], "nf4": [2.4, 2.6, 2.3, 2.4, 2.38]}
    for values in world.settings():
        value = values_of[values["quantization"]][values["seed"]]
        world.run(values, metrics={"train/loss": loss(value, num_examples=None)})
    verdict = world.verdict()
    d = np.array(values_of["none"]) - np.array(values_of["nf4"])
    assert verdict.estimate is not None
    assert verdict.estimate.standard_error == pytest.approx(stats.sem(d) * np.sqrt(5 / 4))
    assert (verdict.estimate.example_part, verdict.estimate.examples) == (None, 0)
    assert "one number per run" in verdict.notes[0]


def test_a_difference_below_the_smallest_of_interest_is_no_reversal(tmp_path: Path) -> None:
    wide = two_arms(tmp_path, {**LOWER, "smallest_difference": 0.4}, shift=0.3).verdict()
    assert wide.decision == "fails" and "not shown to be reversed" in wide.sentence
    turned = two_arms(tmp_path / "x", shift=-0.3).verdict()
    assert turned.decision == "fails" and "reversed" not in turned.sentence


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
    claims: list[dict[str, Any]] = [
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
    assert "but a step goes back: c - d is -0.4" in found["zigzag"].sentence
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


def test_verdicts_survive_json(tmp_path: Path) -> None:
    claim = {"id": "x", "statement": "s", "rule": "exact", "value": "1 + 1", "low": 2}
    for verdict in two_arms(tmp_path, LOWER, claim, {**LOWER, "id": "l", "seeds": 9}).verdicts():
        assert verdict_from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
