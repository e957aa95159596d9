"""How the cost of scoring grows, how far scores move with the chunk budget, and what the guard costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from lora_lab.evaluate.heldout import scoring_mode
from tests.benchmarks.eval_compare import allowed_nats
from tests.benchmarks.eval_rows import Growth
from tests.benchmarks.eval_timing import Bench, Call, TimedModel, run_row
from tests.benchmarks.eval_work import work_of

Report = Callable[[str], None]


def request_growth(bench: Bench, growth: Growth, report: Report) -> list[dict[str, Any]]:
    """Seconds of both engines for the first n requests of a task, lm-eval's up to `stock_requests` of them."""
    pool = run_row(bench, growth.pool, bench.models["tree"]).calls[0].requests
    points = []
    for index, count in enumerate(number for number in growth.requests if number <= len(pool)):
        engines = ["tree", "stock"] if count <= growth.stock_requests else ["tree"]
        calls = {engine: _score(bench.models[engine], pool[:count]) for engine in engines[:: -1 if index % 2 else 1]}
        points.append({"requests": count, **_point(calls, bench)})
        report(f"{growth.pool.name}, {count} requests: {_seconds_text(calls)}")
    return points


def prefix_growth(bench: Bench, growth: Growth, report: Report) -> list[dict[str, Any]]:
    """Seconds of both engines for the same documents behind more and more examples."""
    points = []
    for index, shots in enumerate(growth.shots):
        row = replace(growth.prefix, num_fewshot=shots)
        engines = ["tree", "stock"][:: -1 if index % 2 else 1]
        calls = {engine: run_row(bench, row, bench.models[engine]).calls[0] for engine in engines}
        points.append({"shots": shots, "requests": len(calls["tree"].requests), **_point(calls, bench)})
        report(f"{row.name}, {shots} examples: {_seconds_text(calls)}")
    return points


def chunk_spread(bench: Bench, growth: Growth, report: Report) -> dict[str, Any]:
    """How far log-likelihoods of the same requests lie apart between chunk budgets.

    largest_spread: nats, the largest over requests of the difference between their highest and lowest value.
    largest_share: the same in tolerances of the request. budgets: seconds and counts of each.
    """
    firsts = [run_row(bench, row, bench.models["tree"]).calls[0] for row in growth.spread]
    requests = [request for call in firsts for request in call.requests]
    budgets, values = [], []
    for chunk_tokens in growth.budgets:
        call = _score(bench.another(engine="tree", guard=False, chunk_tokens=chunk_tokens), requests)
        values.append([value for value, _ in call.answers])
        kept = ("passes", "computed_tokens", "padded_tokens", "row_tokens")
        counts = {key: call.facts.get(key) for key in kept}
        budgets.append({"chunk_tokens": chunk_tokens, "seconds": call.seconds, **counts})
        report(f"chunks of {chunk_tokens} tokens: {call.seconds:.1f} s")
    spreads = [max(of_one) - min(of_one) for of_one in zip(*values, strict=True)]
    scored = [len(continuation) for call in firsts for _, _, continuation in call.pairs]
    return {
        "rows": {row.name: dict(row.documents) for row in growth.spread},
        "requests": len(spreads),
        "largest_spread": max(spreads),
        "largest_share": max(spread / allowed_nats(count) for spread, count in zip(spreads, scored, strict=True)),
        "budgets": budgets,
    }


def guard_cost(bench: Bench, growth: Growth, report: Report) -> dict[str, Any]:
    """Seconds and verdict of the guard, which a user pays once per base and kind of adapter."""
    lm = bench.another(engine="tree", guard=True)
    calls = run_row(bench, growth.guard, lm).calls
    verdicts = [call.facts["guard"] for call in calls if "guard" in call.facts]
    report(f"guard over {growth.guard.name}: {lm.guard_seconds:.1f} s")
    return {"tasks": dict(growth.guard.documents), "seconds": lm.guard_seconds, "verdicts": verdicts}


def _score(lm: TimedModel, requests: Sequence[Any]) -> Call:
    lm.take_calls()
    with scoring_mode(lm.model):
        lm.loglikelihood(requests)
    return lm.take_calls()[0]


def _point(calls: dict[str, Call], bench: Bench) -> dict[str, Any]:
    work = work_of(calls["tree"].pairs, max_length=bench.models["tree"].max_length)
    seconds = {engine: calls[engine].seconds if engine in calls else None for engine in ("stock", "tree")}
    return {**asdict(work), "seconds": seconds}


def _seconds_text(calls: dict[str, Call]) -> str:
    return ", ".join(f"{engine} {calls[engine].seconds:.1f} s" for engine in sorted(calls))
