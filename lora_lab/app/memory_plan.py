"""`plan --memory`: what every trial of a plan is predicted to take, on which device, and a page of each on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.app.memory_ahead import predict_ahead
from lora_lab.app.memory_device import Against, named_device, own_machine_id, whole_device
from lora_lab.app.memory_predicted import Predictor, progress_of
from lora_lab.app.own_flags import DEVICE, EXPLAIN, OwnFlags
from lora_lab.app.planning import Plan, cache_folder
from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.plan.fit import Fit
from lora_lab.plan.job import Job
from lora_lab.plan.prediction import Prediction
from lora_lab.plan.row import PlanRow
from lora_lab.record.ledger import Ledger
from lora_lab.report.terminal_memory import SECONDS, MemoryPlan, MemoryRow, bar_width, print_drawing, print_memory_plan
from lora_lab.schema.trial import Lab
from lora_lab.study.predicted_time import Speeds

if TYPE_CHECKING:
    from lora_lab.app.memory_explained import Drawing

# Each is a page to read, and a drawing as high as the terminal.
_MOST_PAGES = 8

Key = tuple[str, int]


def plan_memory(plan: Plan, asked: OwnFlags) -> int:
    """Predicts and prints; returns the exit code.

    Raises:
        InputError: more trials are to be explained than anybody reads.
        MachineError: no device was named, and that of the run is not on this machine.
    """
    if asked.explain and len(plan.jobs) > _MOST_PAGES:
        text = f"draws a page per trial; these are {len(plan.jobs)}, at most {_MOST_PAGES} can be explained at once"
        raise InputError(Problem(EXPLAIN, text))
    against = _against(asked, plan.lab)
    predictor = Predictor(against.kind, plan.lab.memory.style, cache_folder(plan.lab))
    speeds = _speeds(plan.lab)
    known: dict[Key, MemoryRow] = {}
    jobs = {(job.fingerprint, job.repeat): job for job in plan.jobs}
    originals = [row for row in plan.rows if row.state != "duplicate"]
    predict_ahead(list(jobs.values()), predictor, against.device)
    with progress_of(len(originals)) as advance:
        for row in originals:
            key = row.fingerprint, row.repeat
            known[key] = _memory_row(row, jobs[key], against, predictor, speeds)
            advance()
    drawings = _drawings(plan, known, predictor) if asked.explain else {}
    pages = {key: str(drawing.path) for key, drawing in drawings.items()}
    rows = tuple(_listed(row, known, pages) for row in plan.rows)
    print_memory_plan(MemoryPlan(rows, against.device, against.kind), as_json=asked.as_json)
    for key, drawing in drawings.items():
        if not asked.as_json:
            print_drawing(known[key].row.name, drawing.bars, pages[key])
    return 0


def _drawings(plan: Plan, known: Mapping[Key, MemoryRow], predictor: Predictor) -> Mapping[Key, Drawing]:
    from lora_lab.app.memory_explained import explain  # figures and page templates, for who asks for them

    return explain(plan, known, predictor, width=bar_width())


def _listed(row: PlanRow, known: Mapping[Key, MemoryRow], pages: Mapping[Key, str]) -> MemoryRow:
    if row.state == "duplicate":
        return MemoryRow(row, None, None, None, {})
    key = row.fingerprint, row.repeat
    return replace(known[key], page=pages.get(key))


def _against(asked: OwnFlags, lab: Lab) -> Against:
    if asked.device is not None:
        return named_device(asked.device, where=DEVICE)
    return whole_device(lab) if lab.memory.device is None else named_device(lab.memory.device, where="memory.device")


def _speeds(lab: Lab) -> Speeds | str:
    """The speeds of this machine's runs, or why it has none."""
    try:
        machine = own_machine_id(lab)
    except MachineError as error:
        return f"it would be that of this machine; {error}"
    return Speeds(tuple(Ledger(Path(lab.root)).runs()), machine)


def _memory_row(row: PlanRow, job: Job, against: Against, predictor: Predictor, speeds: Speeds | str) -> MemoryRow:
    missing: dict[str, str] = {}
    prediction: Prediction | None = None
    fit: Fit | str | None = None
    found = predictor.of(job)
    if isinstance(found, str):
        missing["prediction"] = found
    else:
        rows, prediction = found
        fit = predictor.fit(job.trial, rows, prediction, against.device)
    if isinstance(fit, str):
        missing["fit"], fit = fit, None
    seconds, grounds = _time_of(job, row, speeds)
    if seconds is None:
        missing[SECONDS] = grounds
    return MemoryRow(row, prediction, fit, seconds, missing, None if seconds is None else grounds)


def _time_of(job: Job, row: PlanRow, speeds: Speeds | str) -> tuple[float | None, str]:
    if isinstance(speeds, str):
        return None, speeds
    time, grounds = speeds.predicted_time(job.trial, job.identities, row.steps)
    return (None if time is None else time.seconds), grounds
