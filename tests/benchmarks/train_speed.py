"""Training speed, side by side: transformers' Trainer with PEFT, TRL's SFTTrainer, the lab alone and in cohorts.

    python -m tests.benchmarks.train_speed --output train_speed.json --plot train_speed.html

All sides train rank-8 adapters in float32 on the same rows of `skills`, with loss on the answers, in steps of 8 rows
per run; each takes its turn, so that a machine whose speed drifts treats all alike. Tokens are real ones, padding is
not counted. The two limits beside them are what the frozen matrix products of forward and backward alone would allow
(`train_work`). Results are written after every case; a second call with the same --output measures only what that file
does not hold yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.train_parts import Setting, measure_case, measure_compile, measure_memory, with_limits
from tests.benchmarks.train_plot import write_plot
from tests.benchmarks.train_rows import COMPILED, MICRO_BATCHES, MODELS, SIDES, TARGETS, Case, chosen_cases
from tests.benchmarks.train_table import cases_text, tail_text

PARTS = ("cases", "memory", "compile")
# Compiling is tried where the goals are stated: a cohort of 8 at micro-batch 2, and one run alone.
_COMPILED_SIDES = ("solo", "cohort_8")
_COMPILED_MICRO_BATCH = 2
_QUICK = {"models": ["tiny_random"], "targets": ["qv"], "micro_batches": [2], "turns": 1, "compile_turns": 2}
_LIBRARIES = ("torch", "transformers", "peft", "trl")

Job = tuple[str, str, Callable[[Setting], dict[str, Any]]]


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Part, name within the part, and what measures it."""
    if "cases" in options.parts:
        for case in chosen_cases(options.models, options.targets, options.micro_batches):
            yield "cases", case.name, partial(measure_case, case, options.sides)
    if "memory" in options.parts:
        for pair in product(options.models, options.targets):
            yield "memory", " ".join(pair), partial(measure_memory, *pair)
    if "compile" in options.parts:
        case = Case(options.models[0], options.targets[0], _COMPILED_MICRO_BATCH)
        for side, how in product((one for one in _COMPILED_SIDES if one in options.sides), COMPILED):
            yield "compile", f"{case.name} {side}{how}", partial(measure_compile, case, side, how)


def measure(options: argparse.Namespace, before: Mapping[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Everything asked for that `before` does not hold; `keep` is given all there is after each."""
    setting = Setting(
        options.cache, options.output.with_suffix(".log"), options.threads, options.turns, options.compile_turns
    )
    result = {part: dict(before.get(part, {})) for part in PARTS}
    spent = float(before.get("seconds", 0.0))
    keep(finished(result, options, spent))
    for part, name, run in jobs(options):
        if name in result[part]:
            _report(f"{part}, {name}: measured before")
            continue
        begin = time.perf_counter()
        result[part][name] = run(setting)
        spent += time.perf_counter() - begin
        _report(f"{part}, {name}: {time.perf_counter() - begin:.0f} s")
        keep(finished(result, options, spent))


def finished(result: Mapping[str, Any], options: argparse.Namespace, spent: float) -> dict[str, Any]:
    """What the file holds. Limits follow from the fastest product of all: what slows a machine down for a while does
    not lower what it can do."""
    speeds = [line["matrix_product_gflops"] for line in result["cases"].values()]
    cases = {name: with_limits(line, gflops=max(speeds)) for name, line in result["cases"].items()}
    return {**_facts(options), "seconds": spent, "matrix_product_gflops": speeds, **result, "cases": cases}


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "quick": options.quick,
        "threads": options.threads,
        "turns": options.turns,
        "dtype": "float32",
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _before(options: argparse.Namespace) -> dict[str, Any]:
    if not options.output.is_file():
        return {}
    found: dict[str, Any] = json.loads(options.output.read_text())
    facts = json.loads(json.dumps(_facts(options)))
    if {key: found.get(key) for key in facts} != facts:
        sys.exit(f"{options.output} was measured with other settings or versions; choose another --output")
    return found


def main() -> None:
    """Prints a table and writes the numbers and plots."""
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        chosen_cases(options.models, options.targets, options.micro_batches)
    except ValueError as error:
        sys.exit(str(error))
    last: dict[str, Any] = {}

    def keep(result: dict[str, Any]) -> None:
        options.output.write_text(json.dumps(result, indent=2, allow_nan=False))
        last.update(result)

    measure(options, _before(options), keep)
    write_plot(last, options.plot)
    print(cases_text(last["cases"].values()))
    print(tail_text(last))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    numbers = lambda text: [int(name) for name in text.split(",") if name]  # noqa: E731
    real = [name for name in MODELS if name != "tiny_random"]
    parser.add_argument("--models", type=names, default=real, help=f"of {','.join(MODELS)}")
    parser.add_argument("--targets", type=names, default=list(TARGETS))
    parser.add_argument("--micro-batches", type=numbers, default=list(MICRO_BATCHES))
    parser.add_argument("--sides", type=names, default=list(SIDES), help=f"of {','.join(SIDES)}")
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--turns", type=int, default=3, help="of each side, after one step that is not measured")
    parser.add_argument("--compile-turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one turn: whether it runs, not how fast")
    parser.add_argument("--cache", type=Path, default=Path("lab/cache"), help="gets the 1B-shaped model too: 2 GB")
    parser.add_argument("--output", type=Path, default=Path("train_speed.json"))
    parser.add_argument("--plot", type=Path, default=Path("train_speed.html"))
    options = parser.parse_args()
    if options.quick:
        vars(options).update(_QUICK)
    wrong = [name for name in options.sides if name not in SIDES] + [
        name for name in options.parts if name not in PARTS
    ]
    if wrong:
        parser.error(f"no such side or part: {', '.join(wrong)}")
    return options


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
