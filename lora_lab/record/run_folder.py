"""What the writer of a run holds: its folder, and the lease that keeps every other process out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_lab.errors import DataError, LabError, MachineError, Problem
from lora_lab.record import run_record
from lora_lab.record.atomic import disk_error, make_folder, read_json, sync_folder, sync_tree, write_json
from lora_lab.record.checkpoint import CHECKPOINT_FOLDER, is_complete, remove_checkpoint
from lora_lab.record.lease import Lease
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader, earlier_attempts

_KEPT_IN_PLACE = (run_record.LOCK_FILE, run_record.ATTEMPTS_FOLDER)


class RunFolder:
    """A claimed run. Use as a context manager: leaving it gives the lease back.

    Everything but `result.json` may be written in any order; `write_result` comes last and ends the attempt.
    """

    def __init__(self, path: Path, header: RunHeader, held: Lease) -> None:
        self.path = path
        self.header = header
        self._lease = held

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def attempt(self) -> int:
        """1 for the first attempt at this run."""
        return self.header.attempt

    @property
    def steps_path(self) -> Path:
        """Where the step log goes."""
        return self.path / run_record.STEPS_FILE

    @property
    def eval_folder(self) -> Path:
        """Where lm-eval's files and `heldout.jsonl` go; made on first use."""
        folder = self.path / run_record.EVAL_FOLDER
        make_folder(folder)
        return folder

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter goes; not made here, since a run may have none."""
        return self.path / run_record.ADAPTER_FOLDER

    @property
    def model_folder(self) -> Path:
        """Where all weights go when the method trains them all."""
        return self.path / run_record.MODEL_FOLDER

    @property
    def changed_folder(self) -> Path:
        """Where the changed weights go when the method trains some of the model's own."""
        return self.path / run_record.CHANGED_FOLDER

    @property
    def layers_path(self) -> Path:
        """Where the log of layers and routers goes."""
        return self.path / run_record.LAYERS_FILE

    @property
    def checkpoint_folder(self) -> Path:
        """Where the state of the training goes while it lasts; not made here."""
        return self.path / CHECKPOINT_FOLDER

    def resumable(self) -> Path | None:
        """The newest checkpoint of the attempts put aside that this attempt may go on from; None where there is none.

        One that is complete and undamaged, of the same trial and the same arithmetic. An attempt that did not get to
        write one hides none of an attempt before it. The logs up to its step lie beside it.
        """
        for number in reversed(earlier_attempts(self.path)):
            attempt = self.path / run_record.ATTEMPTS_FOLDER / str(number)
            checkpoint = attempt / CHECKPOINT_FOLDER
            if self._is_alike(attempt / run_record.TRIAL_FILE) and is_complete(checkpoint):
                return checkpoint
        return None

    def _is_alike(self, path: Path) -> bool:
        """Whether the attempt of a `trial.json` is at the same trial with the same arithmetic."""
        try:
            found = read_json(path)
            said = (found["fingerprint"], found["numerics_version"])
        except (LabError, KeyError, TypeError):
            return False
        return said == (self.header.fingerprint, self.header.numerics_version)

    def drop_checkpoints(self) -> None:
        """Removes all checkpoints of the run, once its result is final; after a crash on the way the rest is no harm.

        Raises:
            MachineError: the disk refuses.
        """
        self.drop_earlier_checkpoints()
        remove_checkpoint(self.checkpoint_folder)

    def drop_earlier_checkpoints(self) -> None:
        """Removes those of attempts put aside, of which none is needed once this attempt has written its own.

        Raises:
            MachineError: the disk refuses.
        """
        for number in earlier_attempts(self.path):
            remove_checkpoint(self.path / run_record.ATTEMPTS_FOLDER / str(number) / CHECKPOINT_FOLDER)

    @property
    def ledger_root(self) -> Path:
        """The root of the ledger that this run is in."""
        return self.path.parent.parent

    def write_result(self, result: Result) -> None:
        """Record how the attempt ended, after everything else in the folder is on disk.

        Raises:
            ValueError: the result is of another run or attempt.
            MachineError: the disk refuses.
        """
        said = (result.run_id, result.fingerprint, result.repeat, result.attempt)
        expected = (self.run_id, self.header.fingerprint, self.header.repeat, self.attempt)
        if said != expected:
            raise ValueError(f"result of {said} handed to run {expected}")
        sync_tree(self.path)
        write_json(self.path / run_record.RESULT_FILE, result.model_dump(mode="json"))

    def close(self) -> None:
        """Give the lease back; doing so twice is fine."""
        self._lease.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def begin_attempt(
    folder: Path, *, header: dict[str, Any], overrides: Sequence[str], environment: dict[str, Any]
) -> RunHeader:
    """Put an earlier attempt aside and write the files that open the next one. The lease must be held.

    Raises:
        MachineError: the disk refuses.
    """
    attempt = _put_aside(folder) + 1
    complete = RunHeader.model_validate({**header, "attempt": attempt})
    write_json(folder / run_record.TRIAL_FILE, complete.model_dump(mode="json"))
    write_json(folder / run_record.OVERRIDES_FILE, list(overrides))
    write_json(folder / run_record.ENVIRONMENT_FILE, environment)
    return complete


def _put_aside(folder: Path) -> int:
    """Move the files of an unfinished attempt to `attempts/N/`; returns the number of the last attempt (0 for none).

    `trial.json` says N and moves last, so that a crash on the way is picked up where it stopped.
    """
    last = max(earlier_attempts(folder), default=0)
    leftovers = sorted(entry for entry in folder.iterdir() if entry.name not in _KEPT_IN_PLACE)
    if not leftovers:
        return last
    number = _attempt_of(folder / run_record.TRIAL_FILE, default=last + 1)
    aside = folder / run_record.ATTEMPTS_FOLDER / str(number)
    make_folder(aside)
    leftovers.sort(key=lambda entry: entry.name == run_record.TRIAL_FILE)
    try:
        for entry in leftovers:
            entry.rename(aside / entry.name)
        sync_folder(aside)
        sync_folder(folder)
    except OSError as error:
        raise disk_error(error, path=aside) from error
    return max(last, number)


def _attempt_of(path: Path, *, default: int) -> int:
    """The attempt that `trial.json` names; `default` where there is none or it cannot be read."""
    try:
        attempt = read_json(path)["attempt"]
    except (DataError, KeyError, TypeError):
        return default
    return attempt if isinstance(attempt, int) and attempt > 0 else default


def refuse_other_trial(path: Path, fingerprint: str) -> None:
    """Two fingerprints that agree in the digits of the folder's name must not share it.

    Raises:
        MachineError: `trial.json` at `path` names another fingerprint.
    """
    try:
        found = json.dumps(read_json(path)["fingerprint"])
    except (DataError, KeyError, TypeError):
        return
    if found != json.dumps(fingerprint):
        raise MachineError(Problem(str(path), f"belongs to another trial ({found}); move the folder away"))
