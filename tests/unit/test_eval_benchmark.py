"""The bookkeeping of `make bench-eval`: counts against hand-worked ones and the engine's own, near-ties, its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lora_lab.models.random import byte_tokenizer, random_network
from tests.benchmarks.eval_compare import compare
from tests.benchmarks.eval_plot import write_plot
from tests.benchmarks.eval_rows import ROWS, Row, chosen_rows
from tests.benchmarks.eval_speed import limit_of, measure_row
from tests.benchmarks.eval_table import rows_text, tail_text
from tests.benchmarks.eval_timing import Bench, Call, EngineRun, run_row
from tests.benchmarks.eval_work import Work, work_of
from tests.evaluation_samples import TINY_SHAPE

ROW = Row("skills", {"skills_trained": 3})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    network, tokenizer = random_network(TINY_SHAPE, seed=0), byte_tokenizer(TINY_SHAPE.max_positions)
    return Bench.of(network, tokenizer, batch_size=4, mirror=None, cache=folder, log=folder / "log")


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, EngineRun]:
    return {engine: run_row(bench, ROW, lm) for engine, lm in bench.models.items()}


def with_answers(run: EngineRun, answers: Sequence[Any], **metrics: float) -> EngineRun:
    """The run with other answers, and other metrics of its first document."""
    (task, samples), *_ = run.samples.items()
    changed = [{**samples[0], **metrics}, *samples[1:]]
    return replace(run, calls=[replace(run.calls[0], answers=answers)], samples={task: changed})


def test_work_of_a_tree_drawn_by_hand() -> None:
    """Inputs 1 2 3, 1 2 4 and 1 2: nodes 1, 2, 3, 4, whose ways are 1, 2, 3, 3 tokens; 2 is scored in the first
    request (two targets) and the last, 3 in the first, 4 in the second."""
    pairs = [(None, [1, 2], [3, 5]), (None, [1, 2, 4], [5]), (None, [1, 2], [9])]
    assert work_of(pairs, max_length=8) == Work(
        flat_tokens=8, nodes=4, scored_nodes=3, attended=1 + 2 + 3 + 3, prefix_tokens=2
    )


def test_operations_of_the_tiny_shape(bench: Bench) -> None:
    """Per layer, weights of q and o 16 x 16, of k and v 16 x 8, of the MLP three times 16 x 16; head 260 x 16."""
    work = Work(flat_tokens=9, nodes=5, scored_nodes=2, attended=7, prefix_tokens=0)
    linear = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 16
    assert work.operations(bench.models["tree"].model) == 2 * linear * 5 + 2 * 260 * 16 * 2 + 4 * 16 * 7


def test_a_row_counts_what_the_engine_counts(bench: Bench, runs: dict[str, EngineRun], tmp_path: Path) -> None:
    line = measure_row(bench, ROW, first="tree")
    (facts,) = line["facts"]
    assert (facts["engine"], line["engine"]) == ("tree", ["tree"])
    assert [line[name] for name in ("requests", "flat_tokens", "nodes")] == [
        facts[name] for name in ("requests", "flat_tokens", "nodes")
    ]
    assert line["documents"]["skills_trained"]["run"] == 3 < line["documents"]["skills_trained"]["all"]
    inputs = {(*context, *continuation[:-1]) for _, context, continuation in runs["tree"].calls[0].pairs}
    longest = max(map(len, inputs))
    read = line["stock_read_tokens"]
    assert sum(map(len, inputs)) <= read <= len(inputs) * longest, "each different input once, padded in its batch"
    assert 0 <= line["largest_difference"] < 1e-4
    assert line["documents_that_differ"] == []
    assert all(values["stock"] == values["ours"] for values in line["metrics"].values())
    limit = limit_of(line, gflops=2.0)
    assert limit["share_of_limit"] * line["seconds"]["ours"] == pytest.approx(line["operations"] / 2e9)
    result = {
        "model": "tiny",
        "dtype": "float32",
        "threads": 1,
        "batch_size": 4,
        "quick": True,
        "load_average": [0.0, 0.0],
        "matrix_product_gflops": [1.0, 1.0],
        "seconds": 1.0,
        "probe_seconds": 0.5,
        "rows": json.loads(json.dumps([line | limit], allow_nan=False)),
    }
    write_plot(result, tmp_path / "plot.html")
    assert "<script" in (tmp_path / "plot.html").read_text()
    assert "skills" in rows_text(result["rows"]) + tail_text(result)


@pytest.mark.parametrize(("moved", "near"), [(5e-5, True), (1e-2, False)])
def test_a_choice_that_flips_is_a_near_tie_within_the_tolerance_only(
    bench: Bench, runs: dict[str, EngineRun], moved: float, near: bool
) -> None:
    stock = runs["stock"]
    answers = [(value + moved, greedy) for value, greedy in stock.calls[0].answers]
    other = 1.0 - float(stock.samples["skills_trained"][0]["acc"])
    agreement = compare(stock, with_answers(stock, answers, acc=other), bench.models["tree"])
    assert agreement.largest_difference == pytest.approx(moved)
    (found,) = agreement.documents_that_differ
    assert (found.task, found.document, found.metric, found.ours) == ("skills_trained", 0, "acc", other)
    assert found.is_near_tie is near
    assert len(agreement.beyond) == (0 if near else len(answers))
    assert all(one.alone == pytest.approx(one.stock, abs=1e-4) for one in agreement.beyond), "of lm-eval on its own"


def test_a_greedy_flag_that_flips_is_a_near_tie_where_logits_are(bench: Bench, runs: dict[str, EngineRun]) -> None:
    """The random model's logits are far apart against rounding, so the flag of an equal log-likelihood is wrong."""
    stock, lm = runs["stock"], bench.models["tree"]
    (value, greedy), *others = stock.calls[0].answers
    changed = with_answers(
        stock, [(value, not greedy), *others], acc=1.0 - float(stock.samples["skills_trained"][0]["acc"])
    )
    (found,) = compare(stock, changed, lm).documents_that_differ
    _, context, continuation = stock.calls[0].pairs[0]
    with torch.no_grad():
        logits = lm.model(torch.tensor([[*context, *continuation[:-1]]])).logits[0, -len(continuation) :]
    leads = []
    for scores, target in zip(logits, continuation, strict=True):
        rest = torch.cat((scores[:target], scores[target + 1 :]))
        leads.append(float(scores[target] - rest.max()))
    assert found.logit == pytest.approx(abs(min(leads)), rel=1e-4)
    assert (found.log_likelihood, found.is_near_tie) == (0.0, False)


def test_rows_are_chosen_and_sized() -> None:
    (row,) = chosen_rows(["six_tasks"], {"blimp_causative": 7}, quick=True)
    assert row.documents["blimp_causative"] == 7
    assert row.documents["arithmetic_2ds"] == 2
    assert [row.name for row in chosen_rows(None, {}, quick=False)] == [row.name for row in ROWS]
    with pytest.raises(ValueError, match="hellaswag"):
        chosen_rows(["hellaswag"], {}, quick=False)


def test_texts_that_part_are_judged_by_the_logits_there(bench: Bench) -> None:
    lm = bench.models["tree"]
    request = Instance("generate_until", {}, ("Q: ab", {}), 0, metadata=("gsm8k", 4, 1))
    sample = {"doc_id": 4, "metrics": ["exact_match"], "filter": "strict-match", "exact_match": 0.0}
    runs = [
        EngineRun(
            engine="any",
            seconds=1.0,
            other_seconds=0.0,
            calls=[Call("generate_until", 1.0, [request], [text], [], 0, {})],
            metrics={},
            samples={"gsm8k": [{**sample, "exact_match": value}]},
            documents={},
        )
        for text, value in (("cde", 0.0), ("cdf", 1.0))
    ]
    agreement = compare(*runs, lm)
    (found,) = agreement.documents_that_differ
    with torch.no_grad():
        logits = lm.model(torch.tensor([lm.tok_encode("Q: abcd")])).logits[0, -1]
    (first,), (second,) = (lm.tok_encode(f"Q: abcd{text}")[-1:] for text in "ef")
    assert found.logit == pytest.approx(float((logits[first] - logits[second]).abs()), rel=1e-4)
    assert (found.document, found.metric, found.is_near_tie) == (4, "exact_match,strict-match", False)
    assert (agreement.other_texts, agreement.largest_difference) == (1, None)
