"""How a run ended: an outcome is data. A run that diverges, runs out of memory, is interrupted or fails is recorded."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_lab.errors import LabError, MachineError
from lora_lab.record.atomic import write_text
from lora_lab.record.result import Status


@dataclass(frozen=True, slots=True)
class Outcome:
    """stop: what ends the sweep as well, once it has been recorded; the next run would fare no better."""

    status: Status
    reason: str | None = None
    stop: BaseException | None = None


COMPLETED = Outcome(Status.COMPLETED)


def outcome_of(error: BaseException, folder: Path) -> Outcome:
    """The outcome of a run that `error` ended; of a bug the traceback goes to the run's `folder`."""
    if isinstance(error, KeyboardInterrupt):
        return Outcome(Status.INTERRUPTED, "interrupted (Ctrl-C)", error)
    if isinstance(error, LabError):
        return Outcome(Status.FAILED, str(error), error if isinstance(error, MachineError) else None)
    if not isinstance(error, Exception):
        raise error
    status = Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.FAILED
    write_text(folder / "traceback.txt", "".join(traceback.format_exception(error)))
    return Outcome(status, f"{type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """torch has no exception class of its own for a CPU that runs out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
