"""The W&B copy of the runs of one call, as a watcher; and how a run of the ledger is sent once more.

Two variables of W&B are heeded, and only towards less: WANDB_MODE=disabled and WANDB_MODE=offline (or dryrun) win over
`tracking=wandb`; no variable makes the lab go online. WANDB_ENTITY stands in for `entity: null`. WANDB_PROJECT is not
read: the project is `tracking.project`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_lab.errors import DataError, MachineError
from lora_lab.record.cohort_facts import cohort_of
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader, RunRecord
from lora_lab.record.step_log import read_steps
from lora_lab.record.wandb_mapping import (
    artifacts_of,
    cohort_config,
    exit_code,
    redacted,
    run_start,
    score_row,
    secrets_in,
    step_row,
    study_start,
    study_summary,
    study_table,
    summary_of,
)
from lora_lab.record.wandb_process import CopyProcess, Destination
from lora_lab.record.watcher import CohortView, StepValues
from lora_lab.schema.tracking import Tracking, WandbTracking

_LONGEST_REASON = 200


class WandbTracker:
    """Copies what the runner tells to W&B, from another process. Use as a context manager; leaving it waits a little
    for what is not through (`wandb_process`).

    Whatever goes wrong with W&B becomes one line on standard error, and the runs go on.
    """

    def __init__(self, tracking: Tracking, root: Path, *, cache: Path, study: str | None) -> None:
        self._destination = destination_of(tracking, os.environ)
        self._root, self._cache = root, cache
        self._studies = () if study is None else (study,)
        self._secrets = secrets_in(os.environ)
        self._process: CopyProcess | None = None
        self._has_warned = False
        self._cohorts: dict[str, str] = {}  # run -> the cohort that its configuration names

    def __enter__(self) -> WandbTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tell(lambda process: process.close())

    def begin(self, total_runs: int) -> None:
        """Starts the process, so that it gets ready while the first model loads; not where nothing is to run."""
        if not total_runs or self._process is not None or self._destination is None:
            return
        try:
            self._process = CopyProcess(
                self._root, self._destination, cache=self._cache, environ=os.environ, on_trouble=self._warn
            )
        except OSError as error:
            self._warn(str(error))

    def run_started(self, header: RunHeader, folder: Path, *, steps: int) -> None:
        """Opens the run; one that is tried again goes on under its id."""
        self._cohorts.pop(header.run_id, None)
        self._tell(lambda process: process.start_run(redacted(run_start(header, self._studies), self._secrets)))

    def phase(self, run_id: str, text: str) -> None:
        """Nothing of it is kept."""

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """A row of the run's history."""
        self._tell(lambda process: process.row(run_id, step_row({**values, "step": step})))

    def cohort(self, cohort_id: str, view: CohortView) -> None:
        """Its id and size go into the configuration of runs that are new in it; the rest is in their rows."""
        for member in view.members:
            self._join(member.run_id, cohort_id, view.seats)

    def _join(self, run_id: str, cohort_id: str, seats: int) -> None:
        if self._cohorts.get(run_id) != cohort_id:
            self._cohorts[run_id] = cohort_id
            self._tell(lambda process: process.configure(run_id, cohort_config(cohort_id, seats)))

    def run_finished(self, header: RunHeader, folder: Path, result: Result) -> None:
        """Scores and summary."""
        if (cohort := cohort_of(result)) is not None:
            self._join(header.run_id, cohort.id, cohort.seats)
        state, secrets = result.status.value, self._secrets
        self._tell(lambda process: finish_run(process, header, folder, result, state=state, secrets=secrets))

    def study_finished(self, study: str, table: Mapping[str, Any]) -> None:
        """The table of a study, as JSON, for the study's own W&B run; nothing where no run of it was new."""
        self._tell(lambda process: send_study(process, study, table, secrets=self._secrets))

    def _tell(self, action: Callable[[CopyProcess], object]) -> None:
        if self._process is not None:
            try:
                action(self._process)
            except Exception as error:  # noqa: BLE001 - a window on the runs must not end them
                self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        is_first, self._has_warned = not self._has_warned, True
        if is_first:
            warn(reason, self._secrets)


def warn(reason: str, secrets: Sequence[str]) -> None:
    """The one line that trouble with W&B is worth."""
    clean = redacted(reason, secrets)
    short = clean if len(clean) <= _LONGEST_REASON else f"{clean[: _LONGEST_REASON - 3]}..."
    print(f"W&B: {short}; the runs go on, and `lora-lab wandb push` copies them from the ledger", file=sys.stderr)


def destination_of(tracking: Tracking, environ: Mapping[str, str]) -> Destination | None:
    """Where copies go, or None where there shall be none."""
    if not isinstance(tracking, WandbTracking):
        return None
    mode = allowed_mode(tracking.mode, environ)
    return None if mode is None else Destination(mode, tracking.project, tracking.entity)


def allowed_mode(mode: str, environ: Mapping[str, str]) -> str | None:
    """`mode`, or less where WANDB_MODE says so; None is no copy at all."""
    asked = environ.get("WANDB_MODE", "").strip().lower()
    if asked == "disabled":
        return None
    return "offline" if asked in ("offline", "dryrun") else mode


def finish_run(
    process: CopyProcess, header: RunHeader, folder: Path, result: Result | None, *, state: str, secrets: Sequence[str]
) -> None:
    """Ends a run with what the ledger says of it."""
    process.finish_run(
        header.run_id,
        row=score_row(result),
        summary=redacted(summary_of(header, result, state=state), secrets),
        exit_code=exit_code(result),
        artifacts=artifacts_of(header, folder),
    )


def send_run(process: CopyProcess, record: RunRecord, studies: Sequence[str], *, secrets: Sequence[str]) -> str | None:
    """A whole run from the ledger: configuration, the steps of its last attempt, scores, summary.

    Returns why it cannot be sent, or None.
    """
    header = record.header
    if header is None or record.state in ("RUNNING", "DAMAGED", "NEWER"):
        return record.problem or f"{record.state}" + (f" ({record.owner})" if record.owner is not None else "")
    try:
        steps = read_steps(record.steps_path) if record.steps_path.exists() else []
    except (DataError, MachineError) as error:
        return str(error)
    process.start_run(redacted(run_start(header, studies, cohort_of(record.result)), secrets))
    for line in steps:
        process.row(header.run_id, step_row(line))
    finish_run(process, header, record.folder, record.result, state=str(record.state), secrets=secrets)
    return None


def send_study(process: CopyProcess, study: str, table: Mapping[str, Any], *, secrets: Sequence[str]) -> str:
    """The study's own run; returns its id."""
    start = redacted(study_start(study), secrets)
    process.start_run(start)
    process.finish_run(
        start["id"],
        summary=redacted(study_summary(table), secrets),
        exit_code=0,
        table=redacted(study_table(table), secrets),
    )
    return str(start["id"])
