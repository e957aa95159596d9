"""A whole sweep from a cold start, side by side: ours as one command, and the same written by hand.

    python -m tests.benchmarks.sweep_speed --mirror DIR --output sweep_speed.json --plot sweep_speed.html

Eight trials (four learning rates, two seeds) of rank-8 LoRA on q and v of SmolLM2-135M, float32: 40 steps of 8 rows,
then six tasks of lm-eval with 100 questions each. Ours is one `lora-lab run -m`; theirs is a Hydra application with
transformers' Trainer, PEFT and lm-eval's hf backend, a fresh process per run. They take turns: ours once before and
once in the middle of theirs. Whether both train alike is a check of its own (`sweep_equality`): the Trainer fed our
order of rows. How our time grows with the number of trials is measured on training alone. Results are written after
every process; a second call with the same --output measures only what that file does not hold yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.machine_speed import product_gflops
from tests.benchmarks.sweep_equality import compare_runs
from tests.benchmarks.sweep_plan import FULL, GROWTH, QUICK, QUICK_TRIALS, TRIALS, Run, Sweep, of_trials
from tests.benchmarks.sweep_plot import write_plot
from tests.benchmarks.sweep_table import sweep_text
from tests.benchmarks.sweep_turns import Places, run_ours, run_theirs
from tests.conftest import SHARED_DATA

PARTS = ("sweep", "equality", "growth")
_OURS = ("first", "second")

Job = tuple[str, str, Callable[[], dict[str, Any]]]


def sweep_jobs(sweep: Sweep, places: Places, *, theirs: int) -> Iterator[Job]:
    """Part, name and measurement of every process: ours, the first half of theirs, ours, the other half."""
    runs = sweep.runs()[:theirs]
    half = (len(runs) + 1) // 2
    for name, some in zip(_OURS, (runs[:half], runs[half:]), strict=True):
        yield "ours", name, partial(run_ours, sweep, f"ours_{name}", places)
        for run in some:
            yield "theirs", run.name, partial(run_theirs, sweep, run, places)


def jobs(options: argparse.Namespace, sweep: Sweep, places: Places) -> Iterator[Job]:
    """All that is asked for."""
    if "sweep" in options.parts:
        yield from sweep_jobs(sweep, places, theirs=options.their_runs or len(sweep.runs()))
    if "equality" in options.parts:
        yield "equality", "pair", partial(_equality, sweep, sweep.runs()[0], places)
    if "growth" in options.parts:
        told = replace(GROWTH, steps=sweep.steps if options.quick else GROWTH.steps, micro_batch=sweep.micro_batch)
        told = replace(told, model=sweep.model)
        for trials in QUICK_TRIALS if options.quick else TRIALS:
            grown = of_trials(told, trials)
            yield "growth", str(trials), partial(run_ours, grown, f"growth_{trials}", places)


def _equality(sweep: Sweep, run: Run, places: Places) -> dict[str, Any]:
    root = places.work / f"ours_{_OURS[0]}" / "root"
    if not root.is_dir():
        return {"failed": "there is no run of ours to compare with: part sweep comes first, with the same --work"}
    return compare_runs(sweep.trial(run, places.mirror.resolve()), root, places.cache, log=places.work / "fed.log")


def measure(
    options: argparse.Namespace, sweep: Sweep, before: Mapping[str, Any], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Everything asked for that `before` does not hold; `keep` is given all there is after each."""
    places = Places(options.work, options.cache, options.mirror, options.threads)
    result: dict[str, Any] = {**facts(options, sweep), "matrix_product_gflops": before.get("matrix_product_gflops", [])}
    result |= {part: dict(before.get(part, {})) for part in ("ours", "theirs", "equality", "growth")}
    result["seconds"] = float(before.get("seconds", 0.0))
    for part, name, run in jobs(options, sweep, places):
        if name in result[part]:
            _report(f"{part}, {name}: measured before")
            continue
        begin = time.perf_counter()
        found = run()
        spent = time.perf_counter() - begin
        result["seconds"] += spent
        why = found.get("failed")
        _report(f"{part}, {name}: {spent:.0f} s" + ("" if why is None else f", failed: {why}"))
        if why is None:
            result[part][name] = found
        result["matrix_product_gflops"].append(product_gflops())
        keep(result)
    return result


def facts(options: argparse.Namespace, sweep: Sweep) -> dict[str, Any]:
    """What a second call must have in common with the first."""
    return {"quick": options.quick, "threads": options.threads, "dtype": "float32", "sweep": sweep.facts()}


def _before(options: argparse.Namespace, sweep: Sweep) -> dict[str, Any]:
    if not options.output.is_file():
        return {}
    found: dict[str, Any] = json.loads(options.output.read_text())
    asked = json.loads(json.dumps(facts(options, sweep)))
    if {key: found.get(key) for key in asked} != asked:
        sys.exit(f"{options.output} was measured with other settings; choose another --output")
    return found


def main() -> None:
    """Prints a table and writes the numbers and a plot."""
    options = _options()
    if not options.mirror.is_dir():
        sys.exit(f"no mirror of official rows at {options.mirror}: nothing to score (--mirror DIR)")
    torch.set_num_threads(options.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    options.work.mkdir(parents=True, exist_ok=True)
    sweep = replace(QUICK if options.quick else FULL, micro_batch=options.micro_batch, model=options.model)

    def keep(result: dict[str, Any]) -> None:
        options.output.write_text(json.dumps(result, indent=2, allow_nan=False))

    result = measure(options, sweep, _before(options, sweep), keep)
    keep(result)
    write_plot(result, options.plot)
    print(sweep_text(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--their-runs", type=int, help="only the first so many of theirs; the rest at their mean")
    parser.add_argument("--model", default=FULL.model, help="another one of conf/model, of the Llama family")
    parser.add_argument("--micro-batch", type=int, default=FULL.micro_batch)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="2 trials, 4 steps, 10 questions: whether it runs")
    parser.add_argument("--mirror", type=Path, default=SHARED_DATA)
    parser.add_argument("--cache", type=Path, default=Path("lab/cache"), help="holds the converted model")
    parser.add_argument("--work", type=Path, default=Path("lab/bench_sweep"), help="ledgers and logs of the runs")
    parser.add_argument("--output", type=Path, default=Path("sweep_speed.json"))
    parser.add_argument("--plot", type=Path, default=Path("sweep_speed.html"))
    options = parser.parse_args()
    if wrong := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(wrong)}")
    return options


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
