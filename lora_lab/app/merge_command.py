"""`merge`: the adapters of runs become one adapter, or plain weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_lab.adapters.combination import COMBINE_KINDS, OTHER_NAMES, RANDOM_KINDS, number_problems
from lora_lab.adapters.merge import combine, merge_into_base
from lora_lab.adapters.mergeable import merge_problem
from lora_lab.adapters.save import load_adapter, save_adapter, save_model
from lora_lab.app.ledger_commands import open_ledger
from lora_lab.app.model_commands import cache_of, load_run, model_parser, saved_problems
from lora_lab.errors import InputError, Problem
from lora_lab.launch.device import choose_device
from lora_lab.models.load import LoadedBase
from lora_lab.record.parents import WEIGHTS
from lora_lab.record.run_record import RunRecord

# Text on which a merged model is compared with the adapter it came from.
_PROBES = ("What is the capital of France?", "Add 17 and 25.", "Write one sentence about the sea.")
_FOR_SEVERAL = ("weights", "kind", "density", "seed")


def main(arguments: Sequence[str]) -> int:
    """Runs `merge ...`; returns the exit code."""
    options = _options(arguments[1:])
    records = _mergeable(options)
    several = _combination(options, len(records)) if len(records) > 1 else None
    _, base, model = load_run(records[0], cache=cache_of(options), device=choose_device(options.device))
    report: dict[str, Any] = {"output": str(options.output)}
    if several is not None:
        _combine(model, records, several)
        report |= several | {"runs": [record.run_id for record in records]}
    if several is None or options.into_base:
        report |= _into_base(model, base, options.output)
    else:
        report["bytes"] = save_adapter(model, options.output, name="merged")
    json.dump(report, sys.stdout, indent=None if options.json else 2)
    print()
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = model_parser(
        "merge",
        "One run: its adapter into the base. Several: their adapters, weighted, into one adapter in PEFT format, or "
        "with --into-base into the base.",
    )
    parser.add_argument("run", nargs="+", help="id, start of an id, or readable name")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--into-base", action="store_true", help="several runs: a whole model instead of an adapter")
    parser.add_argument("--weights", help="several runs: one number each, as 0.5,0.5 (default: equal shares)")
    parser.add_argument(
        "--kind",
        help=f"several runs: {', '.join(COMBINE_KINDS)} (default: linear, with --into-base cat, the exact sum)",
    )
    parser.add_argument("--density", type=float, help="ties, dare: share of each adapter's entries that is kept")
    parser.add_argument("--seed", type=int, help="dare: of the entries that are kept (default: 0)")
    parser.add_argument("--json", action="store_true", help="one line")
    return parser.parse_args(arguments)


def _mergeable(options: argparse.Namespace) -> list[RunRecord]:
    """The runs that were named; raises InputError with all that keeps them from being merged."""
    ledger = open_ledger(options.root)
    records = [ledger.resolve(name) for name in options.run]
    is_alone = len(records) == 1
    problems = [problem for record in records for problem in _adapter_problems(record, is_alone=is_alone)]
    ids = [record.run_id for record in records]
    problems += [Problem(run_id, "given more than once") for run_id in dict.fromkeys(ids) if ids.count(run_id) > 1]
    problems += [
        Problem(record.run_id, "was trained on another base model than the first run")
        for record in records[1:]
        if _base_of(record) != _base_of(records[0])
    ]
    if is_alone:
        given = [key for key in _FOR_SEVERAL if getattr(options, key) is not None]
        problems += [Problem(f"--{key}", "is for several runs; one was given") for key in given]
    if options.output.exists():
        problems.append(Problem("--output", f"{options.output} exists already"))
    if problems:
        raise InputError(problems)
    return records


def _base_of(record: RunRecord) -> tuple[object, ...]:
    """What the weights under a run's adapter are."""
    below = None if record.header is None else record.header.identities.get(WEIGHTS)
    return record.trial.get("model"), below


def _adapter_problems(record: RunRecord, *, is_alone: bool) -> list[Problem]:
    kind = str(record.trial.get("method", {}).get("kind"))
    if problem := merge_problem(kind, run=record.run_id, is_alone=is_alone):
        return [Problem(record.run_id, problem)]
    return saved_problems(record, record.adapter_folder)


def _combination(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """kind, weights, density and seed, checked; raises InputError."""
    kind = options.kind or ("cat" if options.into_base else "linear")
    kind = OTHER_NAMES.get(kind, kind)
    seed = 0 if options.seed is None and kind in RANDOM_KINDS else options.seed
    weights = _weights(options.weights, count)
    problems = number_problems(count, weights, kind=kind, density=options.density, seed=seed)
    if problems:
        raise InputError([Problem(f"--{problem.where}", problem.message) for problem in problems])
    return {"kind": kind, "weights": weights, "density": options.density, "seed": seed}


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(Problem("--weights", f'expected numbers as 0.5,0.5, got "{text}"')) from None


def _combine(model: Any, records: Sequence[RunRecord], several: dict[str, Any]) -> None:
    """Makes the adapter `merged`, and makes it active."""
    names = ["default"]
    for index, record in enumerate(records[1:], start=1):
        load_adapter(model, record.adapter_folder, name=f"other{index}")
        names.append(f"other{index}")
    combine(model, names, result="merged", **several)
    model.set_adapter("merged")


def _into_base(model: Any, base: LoadedBase, output: Path) -> dict[str, Any]:
    merged = merge_into_base(model, _probe_ids(base))
    quantization = base.facts["quantization"]
    return {
        "bytes": save_model(merged.model, base.tokenizer, output),
        "precision": base.facts["precision"],
        "dequantized": None if quantization is None else quantization["kind"],
        "largest_logit_difference": merged.largest_logit_difference,
        "probe": list(_PROBES),
    }


def _probe_ids(base: LoadedBase) -> torch.Tensor:
    rows = [base.tokenizer(text)["input_ids"] for text in _PROBES]
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows], device=base.model.device)
