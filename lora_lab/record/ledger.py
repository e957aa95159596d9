"""The ledger: one folder per run under ROOT/runs, named by what is run, so that the same trial always finds its result.

ROOT/runs/<16 digits of the fingerprint>[.rN]/
    trial.json  overrides.json  environment.json    written when the run is claimed
    steps.jsonl  eval/  adapter/                    written by the run
    checkpoint/                                     state of the training while it lasts (record.checkpoint)
    result.json                                     written last
    attempts/N/                                     earlier attempts without a final result; the run goes on from the
                                                    newest checkpoint in them
    lock                                            the lease of the process at work
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import InputError, MachineError, Problem, nearest
from lora_lab.record import lease, run_record
from lora_lab.record.atomic import disk_error, make_folder
from lora_lab.record.environment import utc_now
from lora_lab.record.run_folder import RunFolder, begin_attempt, refuse_other_trial
from lora_lab.record.run_record import HEADER_SCHEMA_VERSION, RunRecord, read_record
from lora_lab.schema.fingerprint import NUMERICS_VERSION
from lora_lab.schema.labels import check_label
from lora_lab.schema.stopping import Stopping

__all__ = ["Ledger", "RunRecord", "run_id_of"]

# Of the fingerprint, in the name of a run's folder.
ID_DIGITS = 16
_SHOWN_CANDIDATES = 10


def run_id_of(fingerprint: str, repeat: int) -> str:
    """The folder name of a run; known before anything is loaded."""
    if len(fingerprint) < ID_DIGITS or not set(fingerprint) <= set("0123456789abcdef"):
        raise ValueError(f"expected a hexadecimal fingerprint, got {fingerprint!r}")
    return fingerprint[:ID_DIGITS] + (f".r{repeat}" if repeat > 0 else "")


class Ledger:
    """All runs under a root folder. Reading never writes; nothing but checkpoints is ever deleted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs_folder = root / "runs"

    def prepare(self) -> None:
        """Make the folders and try to write, so that a disk that refuses is known before any work.

        Raises:
            MachineError: the root is a file, is read-only, or has no space.
        """
        make_folder(self.runs_folder)
        probe = self.runs_folder / ".writable"
        try:
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise disk_error(error, path=self.runs_folder) from error

    def claim(
        self,
        fingerprint: str,
        repeat: int,
        *,
        name: str,
        setting: str,
        trial: Mapping[str, Any],
        identities: Mapping[str, str],
        overrides: Sequence[str],
        environment: Mapping[str, Any],
        tag: str | None = None,
        stopping: Stopping | None = None,
    ) -> RunFolder | None:
        """The run's folder, held by this process until closed; None where there is nothing to do here.

        None means that the run is done, or that another process is at it: `find` tells which, and who. Files of an
        earlier attempt that did not end are moved to `attempts/N/`, its checkpoint with them (`RunFolder.resumable`).
        stopping: the rule of the search; a run that it has stopped is done. With None a run that any rule has stopped
        is taken up again.

        Raises:
            InputError: the folder was written by a newer lab.
            MachineError: the disk refuses.
        """
        folder = self.runs_folder / run_id_of(fingerprint, repeat)
        if folder.is_dir() and _is_settled(folder, stopping):
            return None
        make_folder(folder)
        held = lease.take(folder / run_record.LOCK_FILE)
        if held is None:
            return None
        try:
            refuse_other_trial(folder / run_record.TRIAL_FILE, fingerprint)
            if _is_settled(folder, stopping):  # settled between the first look and the lease
                held.release()
                return None
            header = {
                "schema_version": HEADER_SCHEMA_VERSION,
                "run_id": folder.name,
                "name": name,
                "fingerprint": fingerprint,
                "setting": setting,
                "repeat": repeat,
                "numerics_version": NUMERICS_VERSION,
                "tag": tag,
                "claimed_at": utc_now(),
                "machine_id": environment.get("machine_id"),
                "identities": dict(identities),
                "trial": dict(trial),
            }
            begun = begin_attempt(folder, header=header, overrides=overrides, environment=dict(environment))
            return RunFolder(folder, begun, held)
        except BaseException:
            held.release()
            raise

    def find(self, fingerprint: str, repeat: int) -> RunRecord | None:
        """The record of a trial's run, or None where it was never begun."""
        folder = self.runs_folder / run_id_of(fingerprint, repeat)
        return read_record(folder) if folder.is_dir() and _has_begun(folder) else None

    def finished(self, stopping: Stopping) -> set[tuple[str, int]]:
        """(fingerprint, repeat) of every run that a search with this rule need not run again."""
        records = [record for record in self.runs() if record.is_done_under(stopping)]
        done = [record.header for record in records if record.header is not None]
        return {(header.fingerprint, header.repeat) for header in done}

    def runs(self) -> list[RunRecord]:
        """Every run, damaged ones included, in the order in which they were claimed.

        Raises:
            MachineError: the root is not a folder, or cannot be read.
        """
        if not self.root.exists():
            return []
        try:
            if not self.root.is_dir():
                raise MachineError(Problem(str(self.root), "root is a file; expected a folder"))
            folders = list(self.runs_folder.iterdir()) if self.runs_folder.exists() else []
            begun = [folder for folder in folders if folder.is_dir() and _has_begun(folder)]
        except OSError as error:
            raise disk_error(error, path=self.runs_folder) from error
        return sorted(map(read_record, begun), key=_claim_order)

    def resolve(self, name: str) -> RunRecord:
        """The run that a user means by an id, a readable name, or the unique beginning of one.

        Raises:
            InputError: nothing, or more than one run, fits.
        """
        records = self.runs()
        for fits in (_equals, _begins):
            found = [record for record in records if fits(record, name)]
            if len(found) == 1:
                return found[0]
            if found:
                raise InputError(Problem("run", f'"{name}" fits {len(found)} runs: {_listed(found)}'))
        try:
            check_label(name)
        except ValueError as error:
            raise InputError(Problem("run", f"not the name of a run: {error}")) from None
        raise InputError(Problem("run", f'no run "{name}" under {self.root}{_nearest_run(name, records)}'))


def _is_settled(folder: Path, stopping: Stopping | None) -> bool:
    record = read_record(folder)
    if record.state == "NEWER":
        raise InputError(Problem("", str(record.problem)))
    return record.is_done if stopping is None else record.is_done_under(stopping)


def _has_begun(folder: Path) -> bool:
    """False for a folder just made and not yet locked, and for a foreign one; true where it may not be looked into."""
    names = (run_record.TRIAL_FILE, run_record.RESULT_FILE, run_record.LOCK_FILE)
    try:
        return any((folder / name).exists() for name in names)
    except OSError:
        return True


def _claim_order(record: RunRecord) -> tuple[str, str]:
    return ("" if record.header is None else record.header.claimed_at, record.run_id)


def _equals(record: RunRecord, name: str) -> bool:
    return name in (record.run_id, record.name) or (record.header is not None and record.header.fingerprint == name)


def _begins(record: RunRecord, name: str) -> bool:
    return bool(name) and (record.run_id.startswith(name) or record.name.startswith(name))


def _listed(records: Sequence[RunRecord]) -> str:
    shown = [f"{record.run_id} ({record.name})" for record in records[:_SHOWN_CANDIDATES]]
    rest = len(records) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _nearest_run(name: str, records: Sequence[RunRecord]) -> str:
    if not records:
        return " (the ledger is empty)"
    names = sorted({record.name for record in records})
    hint = nearest(name, names)
    if len(names) > _SHOWN_CANDIDATES:
        hint = hint.partition(" (choices:")[0] + f" ({len(names)} runs; lora-lab runs lists them)"
    return hint
