"""Runs jobs one after another in this process: skips what is done, tries again what failed, goes on after failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_lab.launch.device import choose_device, gpu_facts
from lora_lab.plan.job import Job
from lora_lab.record.atomic import make_folder
from lora_lab.record.environment import environment
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.watcher import Watcher
from lora_lab.runner.job import run_job
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
    device = choose_device(lab.launch.device)
    ledger.prepare()
    make_folder(cache)
    surroundings = environment(gpu_facts(device))
    todo = [job for job in jobs if not _is_done(ledger, job)]
    watcher.begin(len(todo))

    def attempt(job: Job) -> Status | None:
        return _run(job, ledger, lab, surroundings, device=device, cache=cache, watcher=watcher)

    ran = 0
    held: list[Job] = []
    for index, job in enumerate(todo):
        status = attempt(job)
        ran += status is not None
        if status is None:
            held.append(job)
        elif lab.fail_fast and not status.is_final:
            return Tally(ran, len(jobs) - len(todo), (), len(todo) - index - 1)
    elsewhere: list[str] = []
    for job in held:
        status = attempt(job)
        ran += status is not None
        if status is None and not _is_done(ledger, job):
            elsewhere.append(job.name)
    return Tally(ran, len(jobs) - len(todo), tuple(elsewhere), 0)


def _run(
    job: Job,
    ledger: Ledger,
    lab: Lab,
    surroundings: Mapping[str, Any],
    *,
    device: torch.device,
    cache: Path,
    watcher: Watcher,
) -> Status | None:
    """Runs one job until it has a final result or the retries are used up; None where it is not ours to run."""
    status = None
    for _ in range(1 + lab.launch.retries):
        folder = _claim(ledger, job, surroundings)
        if folder is None:
            break
        with folder:
            status = run_job(job, folder, device=device, cache=cache, watcher=watcher).status
        if status.is_final:
            break
    return status


def _is_done(ledger: Ledger, job: Job) -> bool:
    record = ledger.find(job.fingerprint, job.repeat)
    return record is not None and record.is_done


def _claim(ledger: Ledger, job: Job, surroundings: Mapping[str, Any]) -> RunFolder | None:
    return ledger.claim(
        job.fingerprint,
        job.repeat,
        name=job.name,
        setting=job.setting,
        trial=job.trial.model_dump(mode="json"),
        identities=job.identities,
        overrides=job.overrides,
        environment=surroundings,
        tag=job.tag,
    )
