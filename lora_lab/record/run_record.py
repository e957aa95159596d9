"""What a reader sees of one run folder: what was asked, how it ended, and whether somebody is at it now.

Reading changes nothing and never fails for a damaged folder: the damage is part of the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_lab.errors import LabError
from lora_lab.plan.stopping import was_stopped_by
from lora_lab.record import lease
from lora_lab.record.atomic import bytes_if_there, parse_json
from lora_lab.record.lease import Owner
from lora_lab.record.result import RESULT_SCHEMA_VERSION, Result, Status
from lora_lab.schema.fingerprint import NUMERICS_VERSION
from lora_lab.schema.stopping import Stopping

HEADER_SCHEMA_VERSION = 1

TRIAL_FILE = "trial.json"
OVERRIDES_FILE = "overrides.json"
ENVIRONMENT_FILE = "environment.json"
RESULT_FILE = "result.json"
STEPS_FILE = "steps.jsonl"
LOCK_FILE = "lock"
EVAL_FOLDER = "eval"
# Inside the eval folder, beside what lm-eval writes.
HELDOUT_FILE = "heldout.jsonl"
ANSWERS_FILE = "answers.jsonl"
ROUTING_FILE = "routing.json"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
CHANGED_FOLDER = "changed"
LAYERS_FILE = "layers.jsonl"
ATTEMPTS_FOLDER = "attempts"

# RUNNING: a process holds the run. DAMAGED: a file cannot be read. NEWER: written by a later lab, and left alone.
State = Status | Literal["RUNNING", "DAMAGED", "NEWER"]


class RunHeader(BaseModel):
    """The content of `trial.json`: the resolved trial and all that identifies this attempt at it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    run_id: str
    name: str
    fingerprint: str
    setting: str
    repeat: int
    attempt: int
    numerics_version: int
    tag: str | None
    claimed_at: str
    machine_id: str | None
    identities: dict[str, str]
    trial: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run of the ledger.

    `header` and `result` are None where the file is not there, or cannot be read: then `problem` says why.
    """

    folder: Path
    header: RunHeader | None
    result: Result | None
    state: State
    problem: str | None
    owner: Owner | None

    @property
    def run_id(self) -> str:
        """The folder's name: sixteen digits of the fingerprint, and `.rN` for repeat N > 0."""
        return self.folder.name

    @property
    def name(self) -> str:
        """The readable name, or the id where it cannot be read."""
        return self.run_id if self.header is None else self.header.name

    @property
    def trial(self) -> dict[str, Any]:
        """The resolved trial; empty where it cannot be read."""
        return {} if self.header is None else self.header.trial

    @property
    def setting(self) -> str | None:
        """Fingerprint of the trial without its seeds."""
        return None if self.header is None else self.header.setting

    @property
    def is_done(self) -> bool:
        """Whether the trial need not run again: a final outcome, by arithmetic equal to today's."""
        return (
            self.result is not None
            and self.result.status.is_final
            and self.result.numerics_version == NUMERICS_VERSION
            and self.state == self.result.status
        )

    def is_done_under(self, stopping: Stopping) -> bool:
        """Whether a search with this rule need not run the trial again: it is done, or this very rule, its settings
        included, has stopped it. What else was stopped goes on.

        A stopped run is judged by its result, not its state: who asks may hold the run already.
        """
        result = self.result
        if result is None or result.status != Status.STOPPED:
            return self.is_done
        is_whole = self.header is not None and result.numerics_version == NUMERICS_VERSION
        return is_whole and was_stopped_by(stopping, result.facts)

    @property
    def numerics_version(self) -> int | None:
        """The version of the arithmetic that the run used."""
        if self.result is not None:
            return self.result.numerics_version
        return None if self.header is None else self.header.numerics_version

    @property
    def eval_folder(self) -> Path:
        """Per-example scores: lm-eval's own files and `heldout.jsonl`."""
        return self.folder / EVAL_FOLDER

    @property
    def adapter_folder(self) -> Path:
        """The trained adapter in PEFT format."""
        return self.folder / ADAPTER_FOLDER

    @property
    def model_folder(self) -> Path:
        """All weights, where the method trains them all (full), in transformers' format."""
        return self.folder / MODEL_FOLDER

    def saved_folder(self, form: str) -> Path:
        """Where what was trained lies, by the form in which it is saved (`Method.saves`); the run itself for none."""
        return self.folder if form == "nothing" else self.folder / form

    @property
    def layers_path(self) -> Path:
        """What was logged of layers and routers at intervals of the training."""
        return self.folder / LAYERS_FILE

    @property
    def steps_path(self) -> Path:
        """The step log."""
        return self.folder / STEPS_FILE

    @property
    def attempts(self) -> int:
        """How many attempts were begun, the present one included."""
        return max([*earlier_attempts(self.folder), 0 if self.header is None else self.header.attempt])


def earlier_attempts(folder: Path) -> list[int]:
    """Numbers of the attempts that were put aside, ascending."""
    try:
        names = [entry.name for entry in (folder / ATTEMPTS_FOLDER).iterdir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read_record(folder: Path) -> RunRecord:
    """The record of a run folder; never raises for what is inside it."""
    header, header_problem = _read_header(folder / TRIAL_FILE)
    result, result_problem, is_newer = _read_result(folder / RESULT_FILE)
    owner = None
    state: State
    if is_newer:
        state = "NEWER"
    elif result is not None and result.status.is_final:
        state = "DAMAGED" if header is None else result.status
    elif lease.is_held(folder / LOCK_FILE):
        state, owner = "RUNNING", lease.owner_of(folder / LOCK_FILE)
    elif result_problem or header_problem:
        state = "DAMAGED"
    else:
        state = Status.INTERRUPTED if result is None else result.status
    problem = result_problem or header_problem
    if state == "DAMAGED" and problem is None:
        problem = f"{folder / TRIAL_FILE}: no such file"
    return RunRecord(folder=folder, header=header, result=result, state=state, problem=problem, owner=owner)


def _read_header(path: Path) -> tuple[RunHeader | None, str | None]:
    try:
        content = bytes_if_there(path)
        return (None, None) if content is None else (RunHeader.model_validate(parse_json(content, path)), None)
    except ValidationError as error:
        return None, _first_fault(path, error)
    except LabError as error:
        return None, str(error)


def _read_result(path: Path) -> tuple[Result | None, str | None, bool]:
    """The result, what is wrong with it, and whether a later lab wrote it."""
    try:
        content = bytes_if_there(path)
        if content is None:
            return None, None, False
        value = parse_json(content, path)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > RESULT_SCHEMA_VERSION:
            rule = f"written by a newer lora-lab (result schema {version}, this one reads {RESULT_SCHEMA_VERSION})"
            return None, f"{path}: {rule}; update lora-lab to read it", True
        return Result.model_validate(value), None, False
    except ValidationError as error:
        return None, _first_fault(path, error), False
    except LabError as error:
        return None, str(error), False


def _first_fault(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{path}: damaged: {where}: {first['msg']}"
