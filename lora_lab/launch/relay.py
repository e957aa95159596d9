"""What a worker's watcher is told, carried to the watcher of the process that started it.

In the worker `Relay` is a watcher like any other: a call puts an event into a queue and returns, and a thread sends it.
Events are methods by name with their arguments; the sweep's `begin` is told by the parent, once, and is not among them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import CohortView, StepValues, Watcher


@dataclass(frozen=True, slots=True)
class RunStarted:
    """As `Watcher.run_started`."""

    header: RunHeader
    folder: Path
    steps: int


@dataclass(frozen=True, slots=True)
class Phase:
    """As `Watcher.phase`."""

    run_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """As `Watcher.step`."""

    run_id: str
    step: int
    values: Mapping[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Cohort:
    """As `Watcher.cohort`."""

    cohort_id: str
    view: CohortView


@dataclass(frozen=True, slots=True)
class RunFinished:
    """As `Watcher.run_finished`."""

    header: RunHeader
    folder: Path
    result: Result


Event = RunStarted | Phase | Step | Cohort | RunFinished


class Relay:
    """A watcher that sends what it is told through `connection`. `close` waits until all of it is through."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def begin(self, total_runs: int) -> None:
        """Nothing: how many runs there are is known to the parent, which tells it once for all workers."""

    def run_started(self, header: RunHeader, folder: Path, *, steps: int) -> None:
        """See `Watcher.run_started`."""
        self._events.put(RunStarted(header, folder, steps))

    def phase(self, run_id: str, text: str) -> None:
        """See `Watcher.phase`."""
        self._events.put(Phase(run_id, text))

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """See `Watcher.step`."""
        self._events.put(Step(run_id, step, dict(values)))

    def cohort(self, cohort_id: str, view: CohortView) -> None:
        """See `Watcher.cohort`."""
        self._events.put(Cohort(cohort_id, view))

    def run_finished(self, header: RunHeader, folder: Path, result: Result) -> None:
        """See `Watcher.run_finished`."""
        self._events.put(RunFinished(header, folder, result))

    def close(self) -> None:
        """Sends what is left; nothing may be told afterwards."""
        self._events.put(None)
        self._thread.join()

    def _send(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self._connection.send(event)
            except OSError:  # nobody listens any more: the parent is gone, and this process goes too
                return


def tell(watcher: Watcher, event: Event) -> None:
    """Calls the watcher's method that the event stands for."""
    if isinstance(event, RunStarted):
        watcher.run_started(event.header, event.folder, steps=event.steps)
    elif isinstance(event, Phase):
        watcher.phase(event.run_id, event.text)
    elif isinstance(event, Step):
        watcher.step(event.run_id, event.step, event.values)
    elif isinstance(event, Cohort):
        watcher.cohort(event.cohort_id, event.view)
    else:
        watcher.run_finished(event.header, event.folder, event.result)
