"""Runs jobs one after another in this process: skips what is done, tries again what failed, goes on after failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.plan.job import Job
from lora_lab.plan.steps import steps_of
from lora_lab.record.environment import environment
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_folder import RunFolder
from lora_lab.report.progress import Progress
from lora_lab.runner import choose_device, gpu_facts, run_job
from lora_lab.schema.trial import Lab


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the jobs: newly run, already in the ledger, running in another process, left out by fail_fast."""

    ran: int
    skipped: int
    elsewhere: tuple[str, ...]
    left_out: int


def run_jobs(jobs: Sequence[Job], ledger: Ledger, lab: Lab, *, cache: Path, progress: Progress) -> Tally:
    """Runs every job that has no final result yet."""
    device = choose_device(lab.launch.device)
    ledger.prepare()
    surroundings = environment(gpu_facts(device))
    todo = [job for job in jobs if not _is_done(ledger, job)]
    ran, elsewhere, left_out = 0, [], 0
    progress.begin(len(todo))
    for index, job in enumerate(todo):
        steps = steps_of(job.trial, job.train_rows)
        status = None
        for _ in range(1 + lab.launch.retries):
            folder = _claim(ledger, job, surroundings)
            if folder is None:
                elsewhere.append(job.name)
                break
            with folder:
                progress.run_started(index, job.name, 0 if steps is None else steps.steps)
                result = run_job(job, folder, device=device, cache=cache, listener=progress)
                progress.run_finished(job.name, result.status, result.reason)
            status = result.status
            if status.is_final:
                break
        ran += status is not None
        if lab.fail_fast and status is not None and not status.is_final:
            left_out = len(todo) - index - 1
            break
    return Tally(ran, len(jobs) - len(todo), tuple(elsewhere), left_out)


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
