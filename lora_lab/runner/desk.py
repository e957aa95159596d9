"""What the runs of a sweep share beside the base: where jobs come from and go, and how they are looked after."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_lab.plan.job import Job
from lora_lab.record.result import Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.watcher import Watcher
from lora_lab.runner.workbench import Workbench
from lora_lab.schema.stopping import Stopping


@dataclass(frozen=True, slots=True)
class Desk:
    """claim: a job's folder, or None where it is not ours to run. is_last: told how each run ended, with the queue (for
    who is tried again); whether nobody else begins. checkpoint_seconds: between two checkpoints of a run.

    stopping: the rule of the search. rivals: (fingerprint, repeat) of the runs that a run is compared with by it.
    """

    bench: Workbench
    watcher: Watcher
    claim: Callable[[Job], RunFolder | None]
    is_last: Callable[[Job, Status, deque[Job]], bool]
    checkpoint_seconds: float
    stopping: Stopping
    rivals: Callable[[Job], Sequence[tuple[str, int]]]
