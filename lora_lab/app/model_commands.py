"""`generate` and `merge`: commands that load a model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_lab.adapters.merge import COMBINE_KINDS, combine, merge_into_base
from lora_lab.adapters.save import load_adapter, save_adapter, save_model
from lora_lab.app.ledger_commands import add_root, open_ledger
from lora_lab.data.encode import prompt_ids, stop_ids
from lora_lab.data.rows import Row
from lora_lab.errors import InputError, Problem, nearest
from lora_lab.launch.device import choose_device
from lora_lab.models.generate import generate
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.model import FolderModel
from lora_lab.schema.trial import Trial, read_trial

# Text on which a merged model is compared with the adapter it came from.
_PROBES = ("What is the capital of France?", "Add 17 and 25.", "Write one sentence about the sea.")


def main(arguments: Sequence[str]) -> int:
    """Runs `generate ...` or `merge ...`; returns the exit code."""
    command, *rest = arguments
    return {"generate": _generate, "merge": _merge}[command](rest)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lora-lab {command}", description=description)
    add_root(parser)
    parser.add_argument("--cache", type=Path, help="where prepared models are kept (default: ROOT/cache)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def _cache(options: argparse.Namespace) -> Path:
    cache: Path = options.root / "cache" if options.cache is None else options.cache
    return cache


def _generate(arguments: Sequence[str]) -> int:
    parser = _parser("generate", "What a run's model answers to a prompt (greedy).")
    parser.add_argument("run", help="id, start of an id, or readable name")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        raise InputError(Problem("--max-new-tokens", f"must be >= 1, got {options.max_new_tokens}"))
    record = open_ledger(options.root).resolve(options.run)
    trial, base, model = _load_run(record, cache=_cache(options), device=choose_device(options.device))
    row = Row.from_pair(options.prompt, "", source="prompt")
    ids = prompt_ids(row, base.tokenizer, trial.data.template)
    stops = stop_ids(base.tokenizer, trial.data.template)
    text = generate(model, base.tokenizer, ids, max_new_tokens=options.max_new_tokens, stop_ids=stops).text
    print(json.dumps({"run": record.run_id, "prompt": options.prompt, "answer": text}) if options.json else text)
    return 0


def _merge(arguments: Sequence[str]) -> int:
    parser = _parser(
        "merge",
        "One run: its adapter into the base. Several: their adapters, weighted, into one adapter in PEFT format.",
    )
    parser.add_argument("run", nargs="+", help="id, start of an id, or readable name")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--weights", help="several runs: one number each, as 0.5,0.5 (default: equal shares)")
    parser.add_argument("--kind", help="several runs: linear (default), svd or ties")
    parser.add_argument("--density", type=float, help="ties: share of each adapter's weights that is kept, as 0.5")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    records = _mergeable(options)
    weights = _weights(options.weights, len(records))
    _, base, model = _load_run(records[0], cache=_cache(options), device=choose_device(options.device))
    is_one = len(records) == 1
    report = _merge_one(model, base, options) if is_one else _merge_several(model, records, weights, options)
    json.dump(report, sys.stdout, indent=None if options.json else 2)
    print()
    return 0


def _mergeable(options: argparse.Namespace) -> list[RunRecord]:
    """The runs that were named; raises InputError with all that keeps them from being merged."""
    ledger = open_ledger(options.root)
    records = [ledger.resolve(name) for name in options.run]
    problems = [problem for record in records for problem in _adapter_problems(record)]
    ids = [record.run_id for record in records]
    problems += [Problem(run_id, "given more than once") for run_id in dict.fromkeys(ids) if ids.count(run_id) > 1]
    problems += [
        Problem(record.run_id, "was trained on another base model than the first run")
        for record in records[1:]
        if record.trial.get("model") != records[0].trial.get("model")
    ]
    if len(records) == 1:
        given = {"--kind": options.kind, "--weights": options.weights, "--density": options.density}
        problems += [Problem(key, "is for several runs; one was given") for key, value in given.items() if value]
    if options.kind not in (None, *COMBINE_KINDS):
        problems.append(Problem("--kind", f'no such kind "{options.kind}"' + nearest(options.kind, COMBINE_KINDS)))
    if options.output.exists():
        problems.append(Problem("--output", f"{options.output} exists already"))
    if problems:
        raise InputError(problems)
    return records


def _adapter_problems(record: RunRecord) -> list[Problem]:
    kind = record.trial.get("method", {}).get("kind")
    if kind in ("full", "base"):
        return [Problem(record.run_id, f"method={kind} has no adapter to merge")]
    return _saved_problems(record, record.adapter_folder)


def _saved_problems(record: RunRecord, folder: Path) -> list[Problem]:
    if record.header is None:
        return [Problem(record.run_id, record.problem or f"{record.state}: it cannot be read")]
    if folder.is_dir():
        return []
    return [Problem(record.run_id, f"{record.name} is {record.state} and has saved no {folder.name}")]


def _merge_one(model: Any, base: LoadedBase, options: argparse.Namespace) -> dict[str, Any]:
    merged = merge_into_base(model, _probe_ids(base))
    size = save_model(merged.model, base.tokenizer, options.output)
    return {
        "output": str(options.output),
        "bytes": size,
        "largest_logit_difference": merged.largest_logit_difference,
        "probe": list(_PROBES),
    }


def _probe_ids(base: LoadedBase) -> torch.Tensor:
    rows = [base.tokenizer(text)["input_ids"] for text in _PROBES]
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows], device=base.model.device)


def _merge_several(
    model: Any, records: Sequence[RunRecord], weights: list[float], options: argparse.Namespace
) -> dict[str, Any]:
    names = ["default"]
    for index, record in enumerate(records[1:], start=1):
        load_adapter(model, record.adapter_folder, name=f"other{index}")
        names.append(f"other{index}")
    kind: Any = options.kind or "linear"
    combine(model, names, weights, kind=kind, density=options.density, result="merged")
    size = save_adapter(model, options.output, name="merged")
    return {
        "output": str(options.output),
        "bytes": size,
        "kind": kind,
        "weights": weights,
        "runs": [record.run_id for record in records],
    }


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(Problem("--weights", f'expected numbers as 0.5,0.5, got "{text}"')) from None
    if len(weights) != count:
        raise InputError(Problem("--weights", f"{len(weights)} weights for {count} runs"))
    if not all(map(math.isfinite, weights)):
        raise InputError(Problem("--weights", f'must be finite, got "{text}"'))
    return weights


def _load_run(record: RunRecord, *, cache: Path, device: torch.device) -> tuple[Trial, LoadedBase, Any]:
    """The trial of a run, its base, and the model as it was scored; raises InputError where it was not saved."""
    kind = record.trial.get("method", {}).get("kind")
    needed = {"base": record.folder, "full": record.model_folder}.get(str(kind), record.adapter_folder)
    if problems := _saved_problems(record, needed):
        raise InputError(problems)
    trial = read_trial(record.trial)
    model = trial.model
    if trial.method.kind == "full":
        model = FolderModel(
            kind="folder", name=model.name, path=str(record.model_folder), shape=None, tie_embeddings=None
        )
    base = load_base(
        model, precision=trial.training.precision, quantization=trial.quantization, device=device, cache=cache
    )
    if not trial.method.has_adapter:
        return trial, base, base.model
    return trial, base, load_adapter(base.model, record.adapter_folder)
