"""Carries out what was asked: prints the plan, or checks once more, runs, and prints the table."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_lab.app.before_loading import check_before_loading
from lora_lab.app.own_flags import OwnFlags
from lora_lab.app.planning import Plan, cache_folder
from lora_lab.app.report_command import draw_page
from lora_lab.record.ledger import Ledger, run_id_of
from lora_lab.record.repeats import with_repeats
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.study_folder import begin_study, page_path, write_table
from lora_lab.record.wandb_tracker import WandbTracker
from lora_lab.record.watcher import Watchers
from lora_lab.report.redraw import Redraw
from lora_lab.report.terminal import print_plan, print_table
from lora_lab.schema.stopping import Stopping
from lora_lab.study.table import settings_table


def carry_out(plan: Plan, *, command: str, own: OwnFlags) -> int:
    """The exit code of `plan` or `run`."""
    if command == "plan" and own.memory:
        from lora_lab.app.memory_plan import plan_memory

        return plan_memory(plan, own)
    if command == "plan":
        print_plan(plan.rows, as_json=own.as_json)
        return 0
    root, study = Path(plan.lab.root), None if plan.study is None else plan.study.name
    with WandbTracker(plan.lab.tracking, root, cache=cache_folder(plan.lab), study=study) as tracker:
        return _run(plan, tracker, as_json=own.as_json)


def _run(plan: Plan, tracker: WandbTracker, *, as_json: bool) -> int:
    from lora_lab.launch.local import run_jobs  # torch from here on: `plan` above does without
    from lora_lab.report.progress import Progress

    cache = cache_folder(plan.lab)
    ledger = Ledger(Path(plan.lab.root))
    check_before_loading(plan)
    folder = _begin(plan)
    page = None if folder is None else Redraw(functools.partial(draw_page, ledger, plan.study))
    with Progress() as progress:
        watchers = Watchers([progress, tracker] if page is None else [progress, tracker, page])
        tally = run_jobs(plan.jobs, ledger, plan.lab, cache=cache, watcher=watchers)
    records = [record for job in plan.jobs if (record := ledger.find(job.fingerprint, job.repeat)) is not None]
    measured = with_repeats(ledger, [run_id_of(job.fingerprint, job.repeat) for job in plan.jobs])
    table = settings_table(measured, metrics=plan.study.metrics if plan.study is not None else None)
    if plan.study is not None and folder is not None:
        write_table(folder, table.to_json())
        tracker.study_finished(plan.study.name, table.to_json())
    if as_json:
        json.dump(table.to_json(), sys.stdout, indent=2)
        print()
    else:
        print_table(table)
    if page is not None and folder is not None:
        page.now()
        print(f"page: {page_path(folder)}", file=sys.stderr)
    for record in records:
        for warning in record.result.facts["warnings"] if record.result is not None else ():
            print(f"{record.name}: {warning}", file=sys.stderr)
    for name in tally.elsewhere:
        print(f"{name}: running in another process; run the same command again for its result", file=sys.stderr)
    if tally.left_out:
        print(f"fail_fast: {tally.left_out} runs left out; the same command runs them", file=sys.stderr)
    return _exit_code(records, plan.lab.launch.stopping, expected=len(plan.jobs))


def _begin(plan: Plan) -> Path | None:
    """Where the page of this call goes: the study's folder, or the root for another sweep; None for a single run."""
    root = Path(plan.lab.root)
    if plan.study is not None:
        return begin_study(root, plan.study, [run_id_of(job.fingerprint, job.repeat) for job in plan.jobs])
    return root if len(plan.jobs) > 1 else None


def _exit_code(records: Sequence[RunRecord], stopping: Stopping, *, expected: int) -> int:
    """What the rule of this very call has stopped is done; a search that went as it was asked to has not failed."""
    done = [
        record
        for record in records
        if record.state == Status.COMPLETED or (record.state == Status.STOPPED and record.is_done_under(stopping))
    ]
    return 0 if len(done) == expected else 3
