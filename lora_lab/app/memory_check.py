"""Before a run loads anything: whether it is predicted to fit into the memory that is there, and what would."""

from __future__ import annotations

from lora_lab.app.memory_ahead import predict_ahead
from lora_lab.app.memory_device import Against, free_device, named_device
from lora_lab.app.memory_predicted import Predictor, progress_of
from lora_lab.app.planning import Plan, cache_folder
from lora_lab.errors import InputError, Problem
from lora_lab.plan.fit import needed_bytes
from lora_lab.plan.job import Job
from lora_lab.plan.prediction import LongestRows, Prediction
from lora_lab.report.text import bytes_text

_MOST_TOLD = 10
_NOTHING = "a smaller micro-batch, gradient checkpointing and an nf4 base, as far as they can be had here, would not do"
_ANYWAY = "memory.on_overflow=try runs it anyway"


def refuse_what_does_not_fit(plan: Plan) -> None:
    """Predicts every run that is new, in the lab's own step, whatever `memory.style` says of plans.

    What cannot be predicted runs, and so does what trains nothing.

    Raises:
        InputError: runs are predicted not to fit; each with what it needs, what there is, and the closest that fits.
        MachineError: a device of `launch.device` is not on this machine.
    """
    jobs = _new_jobs(plan)
    if plan.lab.memory.on_overflow == "try" or not jobs:
        return
    against = _against(plan, len(jobs))
    predictor = Predictor(against.kind, "own", cache_folder(plan.lab))
    problems: list[Problem] = []
    predict_ahead(jobs, predictor, None)
    with progress_of(len(jobs)) as advance:
        for job in jobs:
            problems += _problems(job, against, predictor, are_enough=len(problems) >= _MOST_TOLD)
            advance()
    if len(problems) > _MOST_TOLD:
        problems[_MOST_TOLD:] = [Problem("", f"{len(problems) - _MOST_TOLD} more do not fit; plan --memory shows all")]
    if problems:
        raise InputError(problems)


def _new_jobs(plan: Plan) -> list[Job]:
    new = {(row.fingerprint, row.repeat) for row in plan.rows if row.state == "new"}
    return [job for job in plan.jobs if (job.fingerprint, job.repeat) in new and job.trial.method.kind != "base"]


def _against(plan: Plan, runs: int) -> Against:
    named = plan.lab.memory.device
    return free_device(plan.lab, runs=runs) if named is None else named_device(named, where="memory.device")


def _problems(job: Job, against: Against, predictor: Predictor, *, are_enough: bool) -> list[Problem]:
    """are_enough: so many are told already that the closest that fit are not looked for."""
    found = predictor.of(job)
    if isinstance(found, str):
        return []
    rows, prediction = found
    if needed_bytes(prediction, against.device) <= against.device.total_bytes:
        return []
    closest = "" if are_enough else f"{_closest(job, rows, against, predictor)}; "
    return [Problem(job.name, f"{_needs(prediction, against)}; {closest}{_ANYWAY}")]


def _needs(prediction: Prediction, against: Against) -> str:
    device = against.device
    counted = [f"{bytes_text(prediction.peak_allocated_bytes)} of tensors"]
    if prediction.peak_reserved_bytes is not None:
        counted.append(f"{bytes_text(prediction.peak_reserved_bytes)} with what the allocator holds")
    if device.context_bytes:
        counted.append(f"{bytes_text(device.context_bytes)} of CUDA context beside it")
    needed = needed_bytes(prediction, device)
    if workspace := needed - device.context_bytes - (prediction.peak_reserved_bytes or prediction.peak_allocated_bytes):
        counted.append(f"{bytes_text(workspace)} of cuBLAS workspace that this device has more than most")
    return (
        f"is predicted not to fit: needs {bytes_text(needed)} ({', '.join(counted)}), "
        f"{bytes_text(needed - device.total_bytes)} more than the {bytes_text(device.total_bytes)} of {device.name} "
        f"({device.source})"
    )


def _closest(job: Job, rows: LongestRows, against: Against, predictor: Predictor) -> str:
    suggestions = predictor.closest(job.trial, rows, against.device)
    if isinstance(suggestions, str):
        return f"what would fit is not known: {suggestions}"
    told = [f"{' '.join(one.overrides)} ({bytes_text(one.peak_bytes)})" for one in suggestions]
    return f"closest that fit: {', or '.join(told)}" if told else _NOTHING
