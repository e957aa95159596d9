"""The evaluation log: held-out loss on the way, from which the rules of a search learn how its runs are doing.

One JSON line per evaluation point, on disk before anything is decided by it, so that decisions survive a kill and see
what other processes have measured: `{"step": 10, "total_steps": 40, "heldout/loss": 2.71}`. A loss that is not finite
is named under `nonfinite`, as in the step log.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lora_lab.errors import LabError
from lora_lab.plan.stopping import History, Stop, decide
from lora_lab.record.atomic import bytes_if_there, disk_error
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.run_record import RunHeader, State
from lora_lab.record.step_log import NONFINITE, StepLog, read_steps
from lora_lab.schema.fingerprint import NUMERICS_VERSION
from lora_lab.schema.stopping import Stopping

EVALUATIONS_FILE = "evaluations.jsonl"
LOSS = "heldout/loss"
_TOTAL = "total_steps"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_ENDS: dict[State, Literal["stopped", "diverged"]] = {Status.STOPPED: "stopped", Status.DIVERGED: "diverged"}


def write_evaluation(folder: Path, step: int, *, total_steps: int, values: Mapping[str, float | int | None]) -> None:
    """Log what was measured after optimizer step `step` of `total_steps`; on disk when this returns.

    folder: of the run. values: by the names of metrics, `heldout/loss` (nats/token, may be NaN) among them, and
    measurements with their units. A step that is measured once more (the run went on from before it) has a second line,
    which then counts.

    Raises:
        ValueError: no held-out loss. MachineError: the disk refuses.
    """
    if values.get(LOSS) is None:
        raise ValueError(f"an evaluation without {LOSS}: {sorted(values)}")
    path = folder / EVALUATIONS_FILE
    _cut_torn_line(path)
    with StepLog(path) as log:
        log.write(step, {_TOTAL: total_steps, **values})


def carry_evaluations(earlier: Path, folder: Path, *, step: int) -> None:
    """Take over what an earlier attempt had measured up to the step from which this one goes on.

    Args:
        earlier: folder of the earlier attempt, which may hold no log. folder: of the run.

    Raises:
        DataError: the earlier log is damaged. MachineError: the disk refuses.
    """
    for line in _lines(earlier / EVALUATIONS_FILE):
        if line["step"] <= step:
            values = {key: value for key, value in line.items() if key not in ("step", _TOTAL, NONFINITE)}
            lost = {key: float(text) for key, text in line.get(NONFINITE, {}).items()}
            write_evaluation(folder, line["step"], total_steps=line[_TOTAL], values={**values, **lost})


def early_stop(folder: RunFolder, stopping: Stopping, step: int, search: Iterable[tuple[str, int]]) -> Stop | None:
    """Whether the rule ends the run that stands at an evaluation point, by what the ledger knows now of its search.

    To be asked after `write_evaluation`, and again when a run goes on from a checkpoint made at a point: it may have
    been killed between the two.

    Args:
        search: (fingerprint, repeat) of the runs of this search whose losses may be compared with this one's
            (`comparable_key`); it may hold the run itself, and runs that were not begun.

    Raises:
        ValueError: `step` is no point of the run, or nothing was written for it. DataError: the run's log is damaged.
    """
    own = history_of(folder.path, folder.header, "RUNNING")
    return decide(stopping, step, own, histories(Ledger(folder.ledger_root), search))


def histories(ledger: Ledger, runs: Iterable[tuple[str, int]]) -> list[History]:
    """How these runs (fingerprint, repeat) are doing; those that were not begun, that cannot be read or that used other
    arithmetic are left out."""
    found = []
    for fingerprint, repeat in runs:
        record = ledger.find(fingerprint, repeat)
        if record is None or record.header is None or record.numerics_version != NUMERICS_VERSION:
            continue
        try:
            found.append(history_of(record.folder, record.header, record.state))
        except LabError:
            continue
    return found


def history_of(folder: Path, header: RunHeader, state: State) -> History:
    """What a run's log says; without a log, that it has no losses yet. Raises DataError where the log is damaged."""
    losses: dict[int, float] = {}
    total = None
    for line in _lines(folder / EVALUATIONS_FILE):
        total = line[_TOTAL]
        lost = line.get(NONFINITE, {}).get(LOSS)
        losses[line["step"]] = float(line[LOSS] if lost is None else lost)
    return History(header.fingerprint, header.setting, total, losses, _ENDS.get(state))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that hold a loss at a step; none where there is no log."""
    if bytes_if_there(path) is not None:
        yield from filter(_is_evaluation, read_steps(path))


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    nonfinite = line.get(NONFINITE, {})
    if not isinstance(nonfinite, Mapping) or not all(text in _NOT_FINITE for text in nonfinite.values()):
        return False
    has_loss = _is_number(line.get(LOSS)) or LOSS in nonfinite
    return has_loss and all(_is_count(line.get(key)) for key in ("step", _TOTAL))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cut_torn_line(path: Path) -> None:
    """Takes off a line that a killed process did not finish; the next one would else be written behind it."""
    content = bytes_if_there(path) or b""
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return
    try:
        os.truncate(path, whole)
    except OSError as error:
        raise disk_error(error, path=path) from error
