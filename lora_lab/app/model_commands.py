"""`generate`, and what every command needs that loads the model of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_lab.app.ledger_commands import add_root, open_ledger
from lora_lab.data.encode import prompt_ids, stop_ids
from lora_lab.data.rows import Row
from lora_lab.errors import InputError, Problem
from lora_lab.launch.device import choose_device
from lora_lab.models.generate import generate
from lora_lab.models.load import LoadedBase
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from lora_lab.restore import Restorer
from lora_lab.schema.method import METHODS
from lora_lab.schema.trial import Trial


def model_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options of every command that loads a model."""
    parser = argparse.ArgumentParser(prog=f"lora-lab {command}", description=description)
    add_root(parser)
    parser.add_argument("--cache", type=Path, help="where prepared models are kept (default: ROOT/cache)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def cache_of(options: argparse.Namespace) -> Path:
    """Where prepared models are kept."""
    cache: Path = options.root / "cache" if options.cache is None else options.cache
    return cache


def main(arguments: Sequence[str]) -> int:
    """Runs `generate ...`; returns the exit code."""
    parser = model_parser("generate", "What a run's model answers to a prompt (greedy).")
    parser.add_argument("run", help="id, start of an id, or readable name")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments[1:])
    if options.max_new_tokens < 1:
        raise InputError(Problem("--max-new-tokens", f"must be >= 1, got {options.max_new_tokens}"))
    record = open_ledger(options.root).resolve(options.run)
    trial, base, model = load_run(record, cache=cache_of(options), device=choose_device(options.device))
    row = Row.from_pair(options.prompt, "", source="prompt")
    ids = prompt_ids(row, base.tokenizer, trial.data.template)
    stops = stop_ids(base.tokenizer, trial.data.template)
    text = generate(model, base.tokenizer, ids, max_new_tokens=options.max_new_tokens, stop_ids=stops).text
    print(json.dumps({"run": record.run_id, "prompt": options.prompt, "answer": text}) if options.json else text)
    return 0


def saved_problems(record: RunRecord, folder: Path) -> list[Problem]:
    """Why there is nothing of the run in `folder`, or no problem."""
    if record.header is None:
        return [Problem(record.run_id, record.problem or f"{record.state}: it cannot be read")]
    if folder.is_dir():
        return []
    return [Problem(record.run_id, f"{record.name} is {record.state} and has saved no {folder.name}")]


def load_run(record: RunRecord, *, cache: Path, device: torch.device) -> tuple[Trial, LoadedBase, Any]:
    """The trial of a run, its base, and the model as it was scored; raises InputError where it was not saved."""
    method = METHODS.get(str(record.trial.get("method", {}).get("kind")))
    if problems := saved_problems(record, record.saved_folder("adapter" if method is None else method.saves)):
        raise InputError(problems)
    return Restorer(Ledger(record.folder.parent.parent), cache, device).model_of(record)
