"""Runs jobs, on each device cohort after cohort, and in each cohort the runs that share its base.

What is done is skipped, what failed is tried again, and one failure does not stop the others.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_lab.launch.device import choose_devices, gpu_facts
from lora_lab.launch.workers import run_on_devices
from lora_lab.memory.malloc import keep_freed
from lora_lab.plan.cohorts import PlannedCohort, plan_cohorts
from lora_lab.plan.job import Job
from lora_lab.plan.stopping import comparable_key
from lora_lab.record.atomic import make_folder
from lora_lab.record.environment import environment
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.watcher import Watcher
from lora_lab.restore import Restorer
from lora_lab.runner.alone import run_alone
from lora_lab.runner.cohort import Cohort
from lora_lab.runner.desk import Desk
from lora_lab.runner.seats import MemoryBudget, seating_of
from lora_lab.runner.workbench import Workbench
from lora_lab.schema.trial import Lab


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the jobs: newly run, already in the ledger, running in another process, left out by fail_fast."""

    ran: int
    skipped: int
    elsewhere: tuple[str, ...]
    left_out: int


def run_jobs(jobs: Sequence[Job], ledger: Ledger, lab: Lab, *, cache: Path, watcher: Watcher) -> Tally:
    """Runs every job that has no final result yet.

    What another process holds is looked at once more when the rest is through: by then it may be done, or free again
    because that process has died.

    Raises:
        InputError: the device's name is none.
        MachineError: there is no such device here, or ledger or cache cannot be written.
    """
    ledger.prepare()
    make_folder(cache)
    todo = [job for job in jobs if not _is_done(ledger, job, lab)]
    watcher.begin(len(todo))
    work = functools.partial(_work, tuple(jobs), ledger, lab, cache)
    returned = run_on_devices(choose_devices(lab.launch.device), work, watcher)
    begun = set[_Key]().union(*(value.begun for value in returned.values))
    rest = [job for job in todo if _key(job) not in begun and not _is_done(ledger, job, lab)]
    is_over = any(value.is_over for value in returned.values)
    elsewhere = () if is_over else tuple(job.name for job in rest)
    return Tally(len(begun), len(jobs) - len(todo), elsewhere, len(rest) if is_over else 0)


_Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Worked:
    """What came of the jobs on one device. begun: fingerprint and repeat of what was run there. is_over: a run has
    failed, and fail_fast is set."""

    begun: frozenset[_Key]
    is_over: bool


def _work(
    jobs: Sequence[Job], ledger: Ledger, lab: Lab, cache: Path, device: torch.device, watcher: Watcher
) -> _Worked:
    """All jobs on one device, as far as no other process has them."""
    keep_freed()
    shift = _Shift(jobs, ledger, lab, Workbench(Restorer(ledger, cache, device), cache, device), watcher)
    shift.run(shift.run([job for job in jobs if not _is_done(ledger, job, lab)]))
    return _Worked(frozenset(shift.begun), shift.is_over)


class _Shift:
    """The work on one device. jobs: of the whole sweep. begun, is_over: see `_Worked`."""

    def __init__(self, jobs: Sequence[Job], ledger: Ledger, lab: Lab, bench: Workbench, watcher: Watcher) -> None:
        self.begun: set[_Key] = set()
        self.is_over = False
        self._ledger, self._lab, self._bench = ledger, lab, bench
        self._surroundings = environment(gpu_facts(bench.device))
        self._tries: dict[_Key, int] = {}
        self._rivals: dict[str, list[_Key]] = {}
        for job in jobs:
            self._rivals.setdefault(comparable_key(job.trial, job.identities), []).append(_key(job))
        launch = lab.launch
        # Workers that were given one device (the CPU, say) count on the same memory.
        self._sharers = max(1, launch.device.count(str(bench.device))) if isinstance(launch.device, tuple) else 1
        self._desk = Desk(
            bench,
            watcher,
            claim=self._claim,
            is_last=self._is_last,
            checkpoint_seconds=launch.checkpoint_seconds,
            stopping=launch.stopping,
            rivals=lambda job: self._rivals[comparable_key(job.trial, job.identities)],
        )

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Runs jobs cohort by cohort; returns those that another process holds, or has finished meanwhile."""
        held: list[Job] = []
        for planned in plan_cohorts(jobs, cohort=self._lab.launch.cohort):
            if not self.is_over:
                held += self._run_cohort(planned)
        return held

    def _run_cohort(self, planned: PlannedCohort) -> list[Job]:
        if planned.why_alone:
            return self._run_one_by_one(planned.jobs)
        seating = seating_of(planned.jobs, self._bench, asked=planned.seats)
        held: list[Job] = []
        if seating.together:
            budget = MemoryBudget(self._bench.device, self._lab.launch.memory_fraction / self._sharers)
            cohort = Cohort(planned.id, seating.together, seating.seats, self._desk, budget)
            cohort.run()
            held += cohort.held
        return held + self._run_one_by_one(seating.apart)

    def _run_one_by_one(self, jobs: Sequence[Job]) -> list[Job]:
        held = []
        queue = deque(jobs)
        while queue and not self.is_over:
            job = queue.popleft()
            folder = self._claim(job)
            if folder is None:
                held.append(job)
            elif self._is_last(job, run_alone(job, folder, self._desk), queue):
                break
        return held

    def _is_last(self, job: Job, status: Status, queue: deque[Job]) -> bool:
        """Notes how a run ended: it comes back to the head of the queue while it has retries left."""
        if not status.is_retried:
            return self.is_over
        key = _key(job)
        self._tries[key] = self._tries.get(key, 0) + 1
        if self._tries[key] <= self._lab.launch.retries:
            queue.appendleft(job)
            return False
        self.is_over = self._lab.fail_fast
        return self.is_over

    def _claim(self, job: Job) -> RunFolder | None:
        folder = self._ledger.claim(
            job.fingerprint,
            job.repeat,
            name=job.name,
            setting=job.setting,
            trial=job.trial.model_dump(mode="json"),
            identities=job.identities,
            overrides=job.overrides,
            environment=self._surroundings,
            tag=job.tag,
            stopping=self._lab.launch.stopping,
        )
        if folder is not None:
            self.begun.add(_key(job))
        return folder


def _key(job: Job) -> _Key:
    return job.fingerprint, job.repeat


def _is_done(ledger: Ledger, job: Job, lab: Lab) -> bool:
    record = ledger.find(job.fingerprint, job.repeat)
    return record is not None and record.is_done_under(lab.launch.stopping)
