"""Runs jobs in this process: cohort after cohort, and in each the runs that share its base.

What is done is skipped, what failed is tried again, and one failure does not stop the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_lab.launch.device import choose_device, gpu_facts
from lora_lab.plan.cohorts import PlannedCohort, plan_cohorts
from lora_lab.plan.job import Job
from lora_lab.record.atomic import make_folder
from lora_lab.record.environment import environment
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.watcher import Watcher
from lora_lab.restore import Restorer
from lora_lab.runner.alone import run_alone
from lora_lab.runner.cohort import Cohort, Desk
from lora_lab.runner.seats import MemoryBudget, seats_for
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
    device = choose_device(str(lab.launch.device))
    return run_on_device(jobs, ledger, lab, device=device, cache=cache, watcher=watcher)


def run_on_device(
    jobs: Sequence[Job], ledger: Ledger, lab: Lab, *, device: torch.device, cache: Path, watcher: Watcher
) -> Tally:
    """As `run_jobs`, on one device."""
    ledger.prepare()
    make_folder(cache)
    todo = [job for job in jobs if not _is_done(ledger, job)]
    watcher.begin(len(todo))
    shift = _Shift(ledger, lab, Workbench(Restorer(ledger, cache, device), cache, device), watcher)
    held = shift.run(todo)
    elsewhere = [job for job in shift.run(held) if not _is_done(ledger, job)]
    begun = len(shift.begun)
    left_out = len(todo) - begun - len(held) if shift.is_over else 0
    return Tally(begun, len(jobs) - len(todo), tuple(job.name for job in elsewhere), left_out)


@dataclass(slots=True)
class _Shift:
    """begun: (fingerprint, repeat) of what was run here. is_over: a run has failed, and fail_fast is set."""

    ledger: Ledger
    lab: Lab
    bench: Workbench
    watcher: Watcher
    begun: set[tuple[str, int]] = field(default_factory=set)
    is_over: bool = False
    _surroundings: Mapping[str, Any] = field(init=False)
    _tries: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Describes the machine once."""
        self._surroundings = environment(gpu_facts(self.bench.device))

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Runs jobs cohort by cohort; returns those that another process holds, or has finished meanwhile."""
        held: list[Job] = []
        for planned in plan_cohorts(jobs, cohort=self.lab.launch.cohort):
            if not self.is_over:
                held += self._run_cohort(planned)
        return held

    def _run_cohort(self, planned: PlannedCohort) -> list[Job]:
        seats = 1 if planned.why_alone else seats_for(planned.jobs, self.bench, asked=planned.seats)
        if seats == 1:
            return self._run_one_by_one(planned.jobs)
        budget = MemoryBudget(self.bench.device, self.lab.launch.memory_fraction)
        desk = Desk(self.bench, self.watcher, self._claim, self._is_last)
        cohort = Cohort(planned.id, planned.jobs, seats, desk, budget)
        cohort.run()
        return cohort.held

    def _run_one_by_one(self, jobs: Sequence[Job]) -> list[Job]:
        held = []
        queue = deque(jobs)
        while queue and not self.is_over:
            job = queue.popleft()
            folder = self._claim(job)
            if folder is None:
                held.append(job)
            elif self._is_last(job, run_alone(job, folder, self.bench, self.watcher), queue):
                break
        return held

    def _is_last(self, job: Job, status: Status, queue: deque[Job]) -> bool:
        """Notes how a run ended: it comes back to the head of the queue while it has retries left."""
        if status.is_final:
            return False
        key = (job.fingerprint, job.repeat)
        self._tries[key] = self._tries.get(key, 0) + 1
        if self._tries[key] <= self.lab.launch.retries:
            queue.appendleft(job)
            return False
        self.is_over = self.lab.fail_fast
        return self.is_over

    def _claim(self, job: Job) -> RunFolder | None:
        folder = self.ledger.claim(
            job.fingerprint,
            job.repeat,
            name=job.name,
            setting=job.setting,
            trial=job.trial.model_dump(mode="json"),
            identities=job.identities,
            overrides=job.overrides,
            environment=self._surroundings,
            tag=job.tag,
        )
        if folder is not None:
            self.begun.add((job.fingerprint, job.repeat))
        return folder


def _is_done(ledger: Ledger, job: Job) -> bool:
    record = ledger.find(job.fingerprint, job.repeat)
    return record is not None and record.is_done
