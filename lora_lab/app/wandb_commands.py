"""`wandb push` copies runs of the ledger to W&B once more; `wandb workspace` makes a view and a report of a study.

Offline, push replaces the run's earlier folder below ROOT/wandb (only such as the lab has written). Online, a run that
is there is resumed under its id, and only the rows it lacks are sent: W&B says at which row it stands, and a run's rows
come in a fixed order. That was tried against a stand-in for W&B's server, not against an account; nor was it tried what
`wandb sync` makes of an offline folder whose run is online already.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.app.ledger_commands import add_root, open_ledger
from lora_lab.app.locations import conf_folder
from lora_lab.errors import DataError, InputError, LabError, MachineError, Problem
from lora_lab.plan.strict_yaml import read_yaml
from lora_lab.record.atomic import write_json
from lora_lab.record.ledger import Ledger, RunRecord
from lora_lab.record.study_folder import StudyRecord, read_study, study_names
from lora_lab.record.wandb_mapping import redacted, secrets_in
from lora_lab.record.wandb_process import CopyProcess, Destination
from lora_lab.record.wandb_tracker import allowed_mode, send_run, send_study
from lora_lab.schema.tracking import check_wandb_name
from lora_lab.study.table import settings_table

# Somebody waits for this command, and may end it; so W&B gets more time than beside a training.
_INIT_SECONDS, _FINISH_SECONDS = 20.0, 60.0
_MOST_FAILURES_IN_A_ROW = 2
_LEAVES = {"offline": "offline.yaml", "online": "wandb.yaml"}
_SPECS_FILE = "wandb_workspace.json"


def main(arguments: Sequence[str]) -> int:
    """Runs `wandb push ...` or `wandb workspace ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lora-lab wandb", description="Windows onto the ledger in W&B.")
    commands = parser.add_subparsers(dest="action", required=True)
    push = commands.add_parser("push", help="copy runs of the ledger to W&B", description=_push.__doc__)
    push.add_argument("run", nargs="*", help="ids, starts of ids, or readable names (default: all runs and studies)")
    push.add_argument("--study", help="the runs of this study, and its table")
    push.add_argument("--mode", choices=tuple(_LEAVES), default="offline", help="default: offline, into ROOT/wandb")
    workspace = commands.add_parser(
        "workspace", help="save a view and a report of a study in W&B", description=_workspace.__doc__
    )
    workspace.add_argument("study")
    workspace.add_argument("--dry-run", action="store_true", help=f"only write {_SPECS_FILE} to the study's folder")
    for one in (push, workspace):
        add_root(one)
        one.add_argument("--project", help="default: as in conf/tracking")
        one.add_argument("--entity", help="user or team (default: WANDB_ENTITY, else the account's)")
    push.add_argument("--cache", type=Path, help="the lab's cache (default: ROOT/cache)")
    options = parser.parse_args(arguments[1:])
    return {"push": _push, "workspace": _workspace}[options.action](options)


def _push(options: argparse.Namespace) -> int:
    """Copy runs from the ledger to W&B: configuration, every step, scores, summary; online also adapters and scores'
    files. Doing it again doubles nothing."""
    ledger = open_ledger(options.root)
    destination = _destination(options, options.mode)
    records, studies = _chosen(options, ledger)
    cache = options.root / "cache" if options.cache is None else options.cache
    process = CopyProcess(
        options.root,
        destination,
        cache=cache,
        environ=os.environ,
        on_trouble=lambda reason: None,  # told run by run below
        init_seconds=_INIT_SECONDS,
        finish_seconds=_FINISH_SECONDS,
    )
    try:
        pushed = _Push(process, secrets_in(os.environ))
        for record, names in records:
            pushed.run(record, names)
        for study in studies:
            pushed.study(study, ledger)
    finally:
        process.close()
    print(f"{pushed.done} copied, {pushed.skipped} skipped, {pushed.failed} failed")
    if destination.mode == "offline" and pushed.done:
        print(f"To send them: wandb sync {shlex.quote(str(options.root / 'wandb'))}")
    return 3 if pushed.failed else 0


def _chosen(options: argparse.Namespace, ledger: Ledger) -> tuple[list[tuple[RunRecord, list[str]]], list[StudyRecord]]:
    """The runs to copy, each with the studies it belongs to, and the studies whose tables are copied."""
    known = list(_readable_studies(options.root))
    if options.study is not None:
        studies = [read_study(options.root, options.study)]
        records = [*studies[0].records(ledger), *map(ledger.resolve, options.run)]
    elif options.run:
        studies, records = [], [ledger.resolve(name) for name in options.run]
    else:
        studies, records = known, ledger.runs()
    unique = {record.run_id: record for record in records}
    return [
        (record, [study.name for study in known if study.has(run_id)]) for run_id, record in unique.items()
    ], studies


def _readable_studies(root: Path) -> Iterator[StudyRecord]:
    for name in study_names(root):
        try:
            yield read_study(root, name)
        except DataError as error:
            print(f"study {name}: skipped: {error}", file=sys.stderr)


class _Push:
    """Sends one thing after the other, and prints a line for each."""

    def __init__(self, process: CopyProcess, secrets: Sequence[str]) -> None:
        self._process = process
        self._secrets = secrets
        self._failures_in_a_row = 0
        self.done = self.skipped = self.failed = 0

    def run(self, record: RunRecord, studies: Sequence[str]) -> None:
        """Copies a run, or says why not."""
        reason = send_run(self._process, record, studies, secrets=self._secrets)
        if reason is not None:
            self._skip(f"{record.run_id} {record.name}", reason)
        else:
            self._await(record.run_id, record.name)

    def study(self, study: StudyRecord, ledger: Ledger) -> None:
        """Copies the table of a study, made anew from its runs."""
        try:
            table = _table_of(study, ledger)
        except InputError as error:
            self._skip(f"study {study.name}", str(error))
            return
        self._await(send_study(self._process, study.name, table, secrets=self._secrets), f"study {study.name}")

    def _skip(self, what: str, reason: str) -> None:
        self.skipped += 1
        print(f"{what}: skipped: {reason}")

    def _await(self, run_id: str, name: str) -> None:
        answer = self._process.outcome(run_id)
        if "error" not in answer:
            self.done += 1
            self._failures_in_a_row = 0
            known = f", {answer['known']} of them were there" if answer["known"] else ""
            print(f"{run_id} {name}: {answer['rows']} rows{known}")
            return
        self.failed += 1
        self._failures_in_a_row += 1
        reason = redacted(answer["error"], self._secrets)
        print(f"{run_id} {name}: failed: {reason}", file=sys.stderr)
        if self._failures_in_a_row >= _MOST_FAILURES_IN_A_ROW:
            raise MachineError(Problem("W&B", f"{reason}; the same command goes on where this one stopped"))


def _table_of(study: StudyRecord, ledger: Ledger) -> dict[str, Any]:
    return settings_table(study.records(ledger), metrics=study.metrics).to_json()


def _destination(options: argparse.Namespace, mode: str) -> Destination:
    """Project and entity as given, else as in the configuration's leaf for the mode.

    Raises:
        InputError: a name that W&B would refuse, or a mode that WANDB_MODE forbids.
    """
    leaf = _leaf(mode)
    problems = []
    chosen: dict[str, str | None] = {}
    for key in ("project", "entity"):
        given = getattr(options, key)
        try:
            chosen[key] = leaf[key] if given is None else check_wandb_name(given)
        except ValueError as error:
            problems.append(Problem(f"--{key}", str(error)))
    if allowed_mode(mode, os.environ) != mode:
        problems.append(Problem("--mode", f"WANDB_MODE={os.environ['WANDB_MODE']} forbids {mode}; unset it first"))
    if problems:
        raise InputError(problems)
    return Destination(mode, str(chosen["project"]), chosen["entity"])


def _leaf(mode: str) -> Mapping[str, Any]:
    return read_yaml(conf_folder() / "tracking" / _LEAVES[mode]).content


def _workspace(options: argparse.Namespace) -> int:
    """Save a view and a report of a study in W&B, new ones each time; with --dry-run only write what would be saved."""
    from lora_lab.report.wandb_workspace import study_windows

    ledger = open_ledger(options.root)
    study = read_study(options.root, options.study)
    table = redacted(_table_of(study, ledger), secrets_in(os.environ))
    destination = _destination(options, "offline" if options.dry_run else "online")
    entity = destination.entity or os.environ.get("WANDB_ENTITY") or ("" if options.dry_run else None)
    question = None if study.study is None else study.study.question
    os.environ["WANDB_SILENT"] = "true"
    try:
        windows = study_windows(study.name, table, question=question, project=destination.project, entity=entity)
        if options.dry_run:
            path = study.folder / _SPECS_FILE
            write_json(path, windows.specs())
            print(f"{path}: the view and the report as they would be saved")
            return 0
        addresses = windows.save()
    except LabError:
        raise
    except Exception as error:  # the libraries raise a dozen classes for no login and no network
        text = redacted(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", ())
        hint = f"see `wandb login`, or --dry-run, which writes {_SPECS_FILE} without a server"
        raise MachineError(Problem("W&B", f"{text}; {hint}")) from error
    for what, address in addresses.items():
        print(f"{what}: {address}")
    return 0
