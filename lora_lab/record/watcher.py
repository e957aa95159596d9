"""Who watches runs go by: the terminal, W&B, the page. What they show is what the ledger holds; they can be left out.

Several runs may be open at once in one process, so every call names its run. Runs that are trained together are told of
one by one like any other, and as a cohort besides: what they share (speed, memory) is the cohort's and not theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader

StepValues = Mapping[str, float | int | None]


@dataclass(frozen=True, slots=True)
class CohortMember:
    """A run that has a seat. `step` of `steps` optimizer steps are done; loss: of the last one, in nats per token, None
    before the first."""

    run_id: str
    name: str
    step: int
    steps: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class CohortView:
    """A cohort at one moment. `seats`: how many runs it trains at once; `waiting`: how many are to join it yet, with
    `waiting_steps` steps in all (None: not known).

    tokens_per_second: of all members together, without padding; memory_bytes: of the process or device, by a key of the
    step log (`rss_bytes`, `allocated_bytes`) that says what it counts. None: not measured.
    """

    members: tuple[CohortMember, ...]
    seats: int
    waiting: int
    tokens_per_second: float | None
    memory_key: str | None
    memory_bytes: float | None
    waiting_steps: int | None = None


class Watcher(Protocol):
    """Told what happens, after it is in the ledger. No method may raise, or take time that matters beside a step."""

    def begin(self, total_runs: int) -> None:
        """A sweep of that many runs begins; those already done are not among them."""

    def run_started(self, header: RunHeader, folder: Path, *, steps: int) -> None:
        """An attempt at a run begins. `steps` is 0 where nothing is trained or the number is not known."""

    def phase(self, run_id: str, text: str) -> None:
        """The run enters a phase: loading, measuring memory, training, saving, scoring (after a colon: how far)."""

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """A step is done; `values` as in the step log."""

    def cohort(self, cohort_id: str, view: CohortView) -> None:
        """What a cohort is at: told once after a tick in which runs have joined or left, else at intervals."""

    def run_finished(self, header: RunHeader, folder: Path, result: Result) -> None:
        """The attempt has ended, and its result is on disk."""


class Watchers:
    """Several watchers as one."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)

    def begin(self, total_runs: int) -> None:
        """See `Watcher.begin`."""
        for one in self._watchers:
            one.begin(total_runs)

    def run_started(self, header: RunHeader, folder: Path, *, steps: int) -> None:
        """See `Watcher.run_started`."""
        for one in self._watchers:
            one.run_started(header, folder, steps=steps)

    def phase(self, run_id: str, text: str) -> None:
        """See `Watcher.phase`."""
        for one in self._watchers:
            one.phase(run_id, text)

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """See `Watcher.step`."""
        for one in self._watchers:
            one.step(run_id, step, values)

    def cohort(self, cohort_id: str, view: CohortView) -> None:
        """See `Watcher.cohort`."""
        for one in self._watchers:
            one.cohort(cohort_id, view)

    def run_finished(self, header: RunHeader, folder: Path, result: Result) -> None:
        """See `Watcher.run_finished`."""
        for one in self._watchers:
            one.run_finished(header, folder, result)
