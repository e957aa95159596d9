"""Comparing two runs: configuration, scores, and paired differences over the examples both have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.run_record import RunRecord
from lora_lab.study.compare import compare_runs, configuration_difference
from lora_lab.study.interval import mcnemar_p
from tests.unit.ledger_samples import ended, loss, trial_of

DATA = {"kind": "skills", "heldout_size": 4, "heldout_seed": 9, "train_size": 100}


def _run(root: Path, *, rank: int, data: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    return ended(root, trial_of(rank=rank, data=data or DATA), **changes)


def _samples(
    record: RunRecord, scores: list[Any], *, task: str = "skills", date: str = "2026-01-01T00-00-00.5", **extra: Any
) -> Path:
    """A samples file as lm-eval writes it: below a folder named by the model."""
    folder = record.eval_folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{task}_{date}.jsonl"
    lines = []
    for index, score in enumerate(scores):
        line = {"doc_id": index, "doc": {"q": index}, "filter": "none", "metrics": ["acc"], "acc": score}
        lines.append(line | {"doc_hash": f"h{index}"} | {key: value[index] for key, value in extra.items()})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _heldout(record: RunRecord, rows: list[tuple[float, int, bool | None]]) -> None:
    record.eval_folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"index": index, "loss": nats, "loss_tokens": tokens, "exact_match": match})
        for index, (nats, tokens, match) in enumerate(rows)
    ]
    (record.eval_folder / "heldout.jsonl").write_text("\n".join(lines) + "\n")


def test_configuration_difference_in_dotted_keys() -> None:
    a = {"rank": 8, "method": {"kind": "lora"}, "optimizer": {"kind": "sgd", "momentum": 0.9}, "x": []}
    b = {"rank": 16, "method": {"kind": "lora"}, "optimizer": {"kind": "adamw"}, "x": []}
    assert configuration_difference(a, b) == {
        "rank": (8, 16),
        "optimizer.kind": ("sgd", "adamw"),
        "optimizer.momentum": (0.9, "(absent)"),
    }


def test_metrics_differ_with_direction_and_one_sided_ones_say_so(tmp_path: Path) -> None:
    up = loss(0.5, higher_is_better=True, unit="fraction")
    a = _run(tmp_path, rank=4, metrics={"heldout/loss": loss(2.5), "acc": up, "old": loss(1.0)})
    b = _run(tmp_path, rank=8, metrics={"heldout/loss": loss(2.0), "acc": up, "new": loss(1.0)})
    comparison = compare_runs(a, b)
    told = {metric.name: (metric.difference, metric.better) for metric in comparison.metrics}
    assert told == {"acc": (0.0, None), "heldout/loss": (-0.5, "b")}
    assert comparison.missing["old"] == "only in a" and comparison.missing["new"] == "only in b"


def test_paired_accuracy_with_mcnemar(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    _samples(a, [1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    _samples(b, [1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    (paired,) = compare_runs(a, b).paired
    assert paired.name == "skills/acc" and paired.interval.n == 6 and paired.left_out == 0
    assert (paired.a, paired.b) == (0.5, pytest.approx(5 / 6))
    assert paired.interval.mean == pytest.approx(2 / 6)
    # differences 0 1 1 1 -1 0: sum of squares 4, variance (4 - 6/9) / 5
    assert paired.interval.standard_error == pytest.approx(((4 - 6 / 9) / 5 / 6) ** 0.5)
    assert (paired.only_a, paired.only_b, paired.p) == (1, 3, mcnemar_p(1, 3))


def test_only_common_examples_are_paired_by_hash_whatever_their_number(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    _samples(a, [1.0, 0.0, 1.0], doc_hash=["x", "y", "z"])
    _samples(b, [1.0, 1.0, 0.0, 0.0], doc_hash=["w", "y", "x", "v"])
    (paired,) = compare_runs(a, b).paired
    assert paired.interval.n == 2 and paired.left_out == 3
    assert (paired.a, paired.b) == (0.5, 0.5) and (paired.only_a, paired.only_b) == (1, 1)


def test_equal_examples_are_paired_in_order_and_missing_hashes_fall_back_to_ids(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    _samples(a, [1.0, 0.0, 1.0], doc_hash=["same", "same", "z"])
    _samples(b, [0.0, 0.0, 1.0], doc_hash=["same", "same", "z"])
    _samples(a, [1.0, 0.0], task="other", doc_hash=[None, None])
    _samples(b, [0.0, 0.0], task="other")
    found = {paired.name: paired for paired in compare_runs(a, b).paired}
    assert found["skills/acc"].interval.n == 3 and found["skills/acc"].only_a == 1
    assert found["other/acc"].interval.n == 2


def test_scores_that_are_no_single_number_say_why_they_are_not_paired(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    for record in (a, b):
        path = _samples(record, [[-3.0, 4], [-2.0, 5]], task="prose")
        path.write_text(path.read_text().replace('"acc"', '"word_perplexity"'))
        nan = _samples(record, [1.0, 0.0], task="broken")
        nan.write_text(nan.read_text().replace('"acc": 0.0', '"acc": NaN'))
    comparison = compare_runs(a, b)
    assert comparison.paired == ()
    assert "no single number" in comparison.missing["prose/word_perplexity (paired)"]
    assert "jsonl:2: the score is nan" in comparison.missing["broken/acc (paired)"]


def test_missing_torn_and_disjoint_samples_say_why(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    _samples(a, [1.0, 0.0], task="only_here")
    _samples(a, [1.0, 0.0], task="torn")
    torn = _samples(b, [1.0, 0.0], task="torn")
    torn.write_text(torn.read_text()[:-20])
    _samples(a, [1.0, 0.0], task="apart", doc_hash=["p", "q"])
    _samples(b, [1.0, 0.0], task="apart", doc_hash=["r", "s"])
    missing = compare_runs(a, b).missing
    assert missing["only_here (paired)"] == "no samples file of this task in b"
    assert f"{torn}:2" in missing["torn (paired)"]
    assert missing["apart (paired)"] == "the runs have no example in common"


def test_samples_files_without_a_date_are_found(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    for record, score in ((a, 0.0), (b, 1.0)):
        dated = _samples(record, [score, score], task="skills_unseen")
        dated.rename(record.eval_folder / "samples_skills_unseen.jsonl")
    (paired,) = compare_runs(a, b).paired
    assert paired.name == "skills_unseen/acc" and paired.interval.mean == 1.0


def test_of_two_dates_the_newer_samples_count(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    _samples(a, [0.0, 0.0, 0.0], date="2026-01-02T00-00-00.1")
    _samples(a, [1.0, 1.0, 1.0], date="2025-12-31T23-59-59.9")
    _samples(b, [0.0, 1.0, 0.0])
    (paired,) = compare_runs(a, b).paired
    assert paired.a == 0.0


def test_filters_are_separate_metrics(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    filters = ["strict", "strict", "loose", "loose"]
    _samples(a, [0.0, 0.0, 1.0, 0.0], filter=filters, doc_hash=["x", "y", "x", "y"])
    _samples(b, [0.0, 1.0, 1.0, 1.0], filter=filters, doc_hash=["x", "y", "x", "y"])
    found = {paired.name: paired for paired in compare_runs(a, b).paired}
    assert set(found) == {"skills/acc,strict", "skills/acc,loose"}
    assert found["skills/acc,loose"].a == 0.5 and found["skills/acc,loose"].left_out == 0


def test_heldout_loss_is_weighted_by_tokens_as_the_metric_is(tmp_path: Path) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    _heldout(a, [(10.0, 4, True), (20.0, 16, False), (6.0, 5, None)])
    _heldout(b, [(8.0, 4, True), (12.0, 16, True), (6.0, 5, True)])
    found = {paired.name: paired for paired in compare_runs(a, b).paired}
    paired = found["heldout/loss"]
    assert paired.a == pytest.approx(36 / 25) and paired.b == pytest.approx(26 / 25)
    assert paired.interval.mean == pytest.approx(-10 / 25)
    # residuals d_i - R n_i with R = -0.4: -0.4, -1.6, 2.0
    assert paired.interval.standard_error == pytest.approx((3 / 2 * (0.16 + 2.56 + 4.0)) ** 0.5 / 25)
    match = found["heldout/exact_match"]
    assert match.interval.n == 2 and match.left_out == 2 and (match.only_a, match.only_b) == (0, 1)


def test_heldout_rows_of_other_data_are_not_paired(tmp_path: Path) -> None:
    a = _run(tmp_path, rank=4)
    b = _run(tmp_path, rank=8, data=DATA | {"heldout_seed": 10})
    c = _run(tmp_path, rank=16, data=DATA | {"train_size": 7})
    d = _run(tmp_path, rank=32)
    for record in (a, b, c):
        _heldout(record, [(1.0, 2, True), (2.0, 2, False)])
    _heldout(d, [(1.0, 2, True), (2.0, 3, False)])
    assert "data.heldout_seed is 9 in a, 10 in b" in compare_runs(a, b).missing["heldout (paired)"]
    assert [paired.name for paired in compare_runs(a, c).paired] == ["heldout/loss", "heldout/exact_match"]
    assert "different loss tokens" in compare_runs(a, d).missing["heldout (paired)"]


@pytest.mark.parametrize("line", ['{"index": 0}', '{"index": 0, "loss": NaN, "loss_tokens": 2, "exact_match": 1}', "x"])
def test_a_damaged_heldout_row_is_named(tmp_path: Path, line: str) -> None:
    a, b = _run(tmp_path, rank=4), _run(tmp_path, rank=8)
    for record in (a, b):
        _heldout(record, [(1.0, 2, True), (2.0, 2, False)])
    path = b.eval_folder / "heldout.jsonl"
    path.write_text(path.read_text() + line + "\n")
    assert f"{path}:3" in compare_runs(a, b).missing["heldout (paired)"]


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    a = _run(tmp_path, rank=4, metrics={"heldout/loss": loss(2.5)})
    b = _run(tmp_path, rank=8, metrics={"heldout/loss": loss(2.0)})
    _samples(a, [1.0, 0.0])
    _samples(b, [1.0, 1.0])
    value = json.loads(json.dumps(compare_runs(a, b).to_json(), allow_nan=False))
    assert value["configuration"] == {"rank": {"a": 4, "b": 8}}
    assert value["metrics"][0]["difference"] == -0.5
    assert value["paired"][0]["mcnemar"] == {"only_a": 0, "only_b": 1, "p": 1.0}
    assert value["paired"][0]["difference"] == 0.5


def test_what_makes_a_comparison_doubtful_is_noted(tmp_path: Path) -> None:
    a = _run(tmp_path, rank=4)
    assert compare_runs(a, a).notes == ("a and b are the same run",)
    assert compare_runs(a, a).configuration == {}
