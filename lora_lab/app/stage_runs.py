"""Runs of one stage of a study: all together, or for the clock one by one in their order. torch from here on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_lab.app.planning import Plan, cache_folder
from lora_lab.app.report_command import draw_page
from lora_lab.app.study_call import StagePlan
from lora_lab.plan.job import Job
from lora_lab.record.ledger import Ledger
from lora_lab.record.watcher import Watcher, Watchers
from lora_lab.report.redraw import Redraw
from lora_lab.schema.study import Study


class WithoutBegin:
    """A watcher whose total is told once by hand, for runs that are handed over one by one."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.run_started, self.phase, self.step = watcher.run_started, watcher.phase, watcher.step
        self.cohort, self.run_finished = watcher.cohort, watcher.run_finished

    def begin(self, total_runs: int) -> None:
        """The whole stage has begun before."""


def run_stage(stage: StagePlan, tracker: Watcher, *, study: Study | None, one_by_one: bool) -> bool:
    """Runs what is missing; returns whether every run of the stage has ended with an answer.

    study: whose page is drawn again as runs end; None draws none. one_by_one: in the order of the points, each alone.
    """
    from lora_lab.launch.local import run_jobs
    from lora_lab.report.progress import Progress

    plan = stage.plan
    ledger, cache = Ledger(Path(plan.lab.root)), cache_folder(plan.lab)
    page = None if study is None else Redraw(functools.partial(draw_page, ledger, study))
    left_out = False
    with Progress() as progress:
        watchers = Watchers([progress, tracker] if page is None else [progress, tracker, page])
        if one_by_one:
            todo = [job for job in plan.jobs if not _is_done(ledger, job, plan)]
            watchers.begin(len(todo))
            for job in todo:
                tally = run_jobs([job], ledger, plan.lab, cache=cache, watcher=WithoutBegin(watchers))
                if left_out := bool(tally.left_out) or (plan.lab.fail_fast and not _is_done(ledger, job, plan)):
                    break
        else:
            tally = run_jobs(plan.jobs, ledger, plan.lab, cache=cache, watcher=watchers)
            left_out = bool(tally.left_out)
    missing = [job.name for job in plan.jobs if not _is_done(ledger, job, plan)]
    if left_out:
        print("fail_fast: runs were left out; the same command runs them", file=sys.stderr)
    _tell(plan.jobs, ledger, missing)
    return not missing


def _is_done(ledger: Ledger, job: Job, plan: Plan) -> bool:
    record = ledger.find(job.fingerprint, job.repeat)
    return record is not None and record.is_done_under(plan.lab.launch.stopping)


def _tell(jobs: Sequence[Job], ledger: Ledger, missing: Sequence[str]) -> None:
    for job in jobs:
        record = ledger.find(job.fingerprint, job.repeat)
        for warning in record.result.facts["warnings"] if record is not None and record.result is not None else ():
            print(f"{record.name if record is not None else job.name}: {warning}", file=sys.stderr)
    if missing:
        print(f"{len(missing)} runs without a result: {', '.join(missing[:5])}", file=sys.stderr)
