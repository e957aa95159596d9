"""`runs` and `compare`: windows onto the ledger. No torch, no Hydra."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.record.atomic import write_text
from lora_lab.record.export import rows_of, to_csv, to_json, to_parquet
from lora_lab.record.ledger import Ledger, RunRecord
from lora_lab.record.result import Status
from lora_lab.record.study_folder import read_study
from lora_lab.report.terminal import print_comparison, print_runs
from lora_lab.study.compare import compare_runs


def main(arguments: Sequence[str]) -> int:
    """Runs `runs ...` or `compare ...`; returns the exit code."""
    command, *rest = arguments
    return {"runs": _runs, "compare": _compare}[command](rest)


def add_root(parser: argparse.ArgumentParser) -> None:
    """The one option that all commands share."""
    parser.add_argument("--root", type=Path, default=Path("lab"), help="the lab's folder (default: ./lab)")


def open_ledger(root: Path) -> Ledger:
    """The ledger below `root`; raises InputError where there is none."""
    ledger = Ledger(root)
    if not ledger.runs_folder.is_dir():
        raise InputError(Problem("--root", f"no ledger in {root} (looked for {ledger.runs_folder})"))
    return ledger


def _runs(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lora-lab runs", description="List the runs of the ledger, or export them.")
    add_root(parser)
    parser.add_argument("--study", help="only runs of this study")
    parser.add_argument("--status", help="only runs with this status, as COMPLETED or RUNNING")
    parser.add_argument("--format", choices=("csv", "parquet", "json"), help="one flat row per run")
    parser.add_argument("--output", type=Path, help="file to write (needed for parquet; default: standard output)")
    parser.add_argument("--json", action="store_true", help="short for --format json")
    options = parser.parse_args(arguments)
    ledger = open_ledger(options.root)
    asked = None if options.study is None else read_study(options.root, options.study, where="--study")
    records = ledger.runs() if asked is None else asked.records(ledger)
    if options.status is not None:
        records = _of_status(records, options.status)
    chosen = "json" if options.json else options.format
    if chosen is None:
        print_runs(records)
        return 0
    _export(records, chosen, options.output)
    return 0


def _of_status(records: Sequence[RunRecord], status: str) -> list[RunRecord]:
    states = [*(one.value for one in Status), "RUNNING", "DAMAGED", "NEWER"]
    if status.upper() not in states:
        raise InputError(Problem("--status", f'no such status "{status}"' + nearest(status.upper(), states)))
    return [record for record in records if record.state == status.upper()]


def _export(records: Sequence[RunRecord], chosen: str, output: Path | None) -> None:
    rows = rows_of(records)
    if chosen == "parquet":
        if output is None:
            raise InputError(Problem("--output", "a parquet file needs a name: --output runs.parquet"))
        to_parquet(rows, output)
        return
    stream = io.StringIO()
    (to_csv if chosen == "csv" else to_json)(rows, stream)
    if output is None:
        sys.stdout.write(stream.getvalue())
    else:
        write_text(output, stream.getvalue())


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lora-lab compare",
        description="Two runs: what differs in their configuration, and their scores, paired by example.",
    )
    add_root(parser)
    parser.add_argument("run", nargs=2, help="id, start of an id, or readable name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    ledger = open_ledger(options.root)
    comparison = compare_runs(*(ledger.resolve(name) for name in options.run))
    if options.json:
        json.dump(comparison.to_json(), sys.stdout, indent=2)
        print()
    else:
        print_comparison(comparison)
    return 0
