"""Scoring speed, side by side in one process: the lab's token tree against lm-eval's own batches.

    python -m tests.benchmarks.eval_speed --output eval_speed.json --plot eval_speed.html

Both engines score the same official rows with the same loaded model (SmolLM2-135M, fp32), in turn, the first one
changing from row to row; a small task is scored by both before. Seconds are those of the model's calls, tokenisation
included; data, prompts and metrics, which lm-eval does alike for both, are `other_seconds`. The guard is off
meanwhile, and timed on its own. The limit is what the arithmetic of the tree's tokens alone would take at the speed of
one large matrix product. A share of a task has fewer requests behind a common header, so it shows less than all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_lab.evaluate.tree.support import why_not_tree
from lora_lab.models.load import load_base
from tests.benchmarks.eval_compare import compare
from tests.benchmarks.eval_growth import chunk_spread, guard_cost, prefix_growth, request_growth
from tests.benchmarks.eval_plot import write_plot
from tests.benchmarks.eval_rows import WARM_UP, Growth, Row, chosen_growth, chosen_rows
from tests.benchmarks.eval_table import rows_text, tail_text
from tests.benchmarks.eval_timing import Bench, EngineRun, run_row
from tests.benchmarks.eval_work import work_of
from tests.benchmarks.machine_speed import product_gflops
from tests.benchmarks.training_speed import CPU, a_trial
from tests.conftest import SHARED_DATA

PARTS = {
    "request_growth": request_growth,
    "prefix_growth": prefix_growth,
    "chunk_spread": chunk_spread,
    "guard": guard_cost,
}


def measure_row(bench: Bench, row: Row, *, first: str) -> dict[str, Any]:
    """Both engines on one row, the engine `first` first, as one line of the table but for its limit."""
    order = sorted(bench.models, key=lambda engine: engine != first)
    runs = {engine: run_row(bench, row, bench.models[engine]) for engine in order}
    stock, ours = runs["stock"], runs["tree"]
    agreement = compare(stock, ours, bench.models["tree"])
    return {
        "row": row.name,
        "num_fewshot": row.num_fewshot,
        "target": row.target,
        "engine": sorted({str(call.facts.get("engine", call.kind)) for call in ours.calls}),
        "why_stock": [call.facts["why_stock"] for call in ours.calls if "why_stock" in call.facts],
        "first": first,
        "documents": {task: {"run": run, "all": all_of} for task, (run, all_of) in ours.documents.items()},
        **_costs(bench, stock, ours),
        **asdict(agreement),
        "metrics": {name: {"stock": value, "ours": ours.metrics.get(name)} for name, value in stock.metrics.items()},
        "facts": [dict(call.facts) for call in ours.calls],
    }


def _costs(bench: Bench, stock: EngineRun, ours: EngineRun) -> dict[str, Any]:
    lm = bench.models["tree"]
    works = [work_of(call.pairs, max_length=lm.max_length) for call in ours.calls]
    # Generation reads most of its tokens one by one: its limit is another one.
    generates = any(call.kind == "generate_until" for call in ours.calls)
    return {
        "requests": sum(len(call.requests) for call in ours.calls),
        "flat_tokens": sum(work.flat_tokens for work in works),
        "nodes": sum(work.nodes for work in works),
        "scored_nodes": sum(work.scored_nodes for work in works),
        "stock_read_tokens": None if generates else sum(call.stock_tokens for call in stock.calls),
        "seconds": {"stock": stock.seconds, "ours": ours.seconds},
        "other_seconds": {"stock": stock.other_seconds, "ours": ours.other_seconds},
        "ratio": stock.seconds / ours.seconds,
        "operations": None if generates else sum(work.operations(lm.model) for work in works),
    }


def limit_of(line: Mapping[str, Any], *, gflops: float) -> dict[str, Any]:
    """Seconds that a row's operations take at this speed, and their share of our seconds."""
    limit = None if line["operations"] is None else line["operations"] / (gflops * 1e9)
    return {"limit_seconds": limit, "share_of_limit": None if limit is None else limit / line["seconds"]["ours"]}


def measure(
    bench: Bench,
    rows: Sequence[Row],
    growth: Growth,
    parts: Sequence[str],
    *,
    facts: Mapping[str, Any],
    keep: Callable[[dict[str, Any]], None] = lambda _result: None,
) -> dict[str, Any]:
    """All rows, then the parts that are asked for; `keep` is given what there is after each."""
    begin = time.perf_counter()
    speeds, loads = [product_gflops()], [os.getloadavg()[0]]
    probe = _probe_seconds(bench)
    for lm in bench.models.values():
        run_row(bench, WARM_UP, lm)
    lines: list[dict[str, Any]] = []
    found: dict[str, Any] = {}

    def so_far() -> dict[str, Any]:
        return {
            **facts,
            "batch_size": bench.models["stock"].batch_size,
            "threads": torch.get_num_threads(),
            "dtype": str(bench.models["tree"].model.dtype).removeprefix("torch."),
            "load_average": loads,
            "matrix_product_gflops": speeds,
            "probe_seconds": probe,
            # The fastest of all: what slows a machine down for a while does not lower its limit.
            "rows": [{**line, **limit_of(line, gflops=max(speeds))} for line in lines],
            **found,
            "seconds": time.perf_counter() - begin,
        }

    for index, row in enumerate(rows):
        lines.append(measure_row(bench, row, first=("stock", "tree")[index % 2]))
        speeds.append(product_gflops())
        loads.append(os.getloadavg()[0])
        _report(f"{row.name}: {lines[-1]['ratio']:.1f} times")
        keep(so_far())
    for name in parts:
        found[name] = PARTS[name](bench, growth, _report)
        keep(so_far())
    return so_far()


def _probe_seconds(bench: Bench) -> float:
    """Of the look at whether the model can be scored by a tree, which is remembered with the model object."""
    start = time.perf_counter()
    why_not_tree(bench.models["tree"].model, depth=1)
    return time.perf_counter() - start


def main() -> None:
    """Prints a table and writes the numbers and plots."""
    options = _options()
    if not options.mirror.is_dir():
        sys.exit(f"no mirror of official rows at {options.mirror}: nothing to score (--mirror DIR)")
    torch.set_num_threads(options.threads)
    try:
        rows = chosen_rows(options.rows, dict(options.documents), quick=options.quick)
    except ValueError as error:
        sys.exit(str(error))
    growth = chosen_growth(dict(options.documents), quick=options.quick)
    trial = a_trial()
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device=CPU, cache=options.cache)
    places = {"mirror": options.mirror, "cache": options.cache, "log": options.output.with_suffix(".log")}
    bench = Bench.of(base.model, base.tokenizer, batch_size=options.batch_size, **places)

    def keep(result: dict[str, Any]) -> None:
        options.output.write_text(json.dumps(_finite(result), indent=2, allow_nan=False))

    facts = {"model": trial.model.name, "quick": options.quick}
    result = measure(bench, rows, growth, options.parts, facts=facts, keep=keep)
    keep(result)
    write_plot(result, options.plot)
    print(rows_text(result["rows"]))
    print(tail_text(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--rows", type=names, help="names with commas between; all unless given")
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {','.join(PARTS)}; all unless given")
    parser.add_argument("--documents", type=_sized, action="append", default=[], metavar="TASK=N")
    parser.add_argument("--quick", action="store_true", help="two documents per task: whether it runs, not how fast")
    parser.add_argument("--batch-size", type=int, default=16, help="of lm-eval's own batches")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mirror", type=Path, default=SHARED_DATA)
    parser.add_argument("--cache", type=Path, default=Path("lab/cache"))
    parser.add_argument("--output", type=Path, default=Path("eval_speed.json"))
    parser.add_argument("--plot", type=Path, default=Path("eval_speed.html"))
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return options


def _sized(text: str) -> tuple[str, int]:
    task, _, count = text.partition("=")
    if not count.isdigit() or not int(count):
        raise argparse.ArgumentTypeError(f"expected TASK=N with N >= 1, got {text}")
    return task, int(count)


def _finite(value: Any) -> Any:
    """JSON has no infinity: unknown gaps become null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
