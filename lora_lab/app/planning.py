"""From composed points to jobs: every trial read and checked, identified, counted, and looked up in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.app.compose import Composition
from lora_lab.app.session import Request
from lora_lab.data.sources import count_train_rows
from lora_lab.errors import InputError, Problem
from lora_lab.evaluate.identity import evaluation_identities
from lora_lab.plan.folder import with_known_shape
from lora_lab.plan.identity import identities_of
from lora_lab.plan.job import Job, job_of
from lora_lab.plan.row import PlanRow, plan_rows
from lora_lab.record.ledger import Ledger
from lora_lab.schema.method import Method
from lora_lab.schema.study import Study
from lora_lab.schema.trial import LAB_KEYS, Lab, Trial, read_lab, read_trial

# Housekeeping that may differ between the points of one sweep.
_PER_POINT = ("study", "tag", "repeat")


@dataclass(frozen=True, slots=True)
class Plan:
    """`rows` says of every asked-for job what is known; `jobs` are those without duplicates, in order."""

    lab: Lab
    study: Study | None
    jobs: tuple[Job, ...]
    rows: tuple[PlanRow, ...]


def cache_folder(lab: Lab) -> Path:
    """Where converted models, generated tasks and hashes are kept."""
    return Path(lab.cache) if lab.cache is not None else Path(lab.root) / "cache"


def make_plan(request: Request) -> Plan:
    """Reads all points, adds the study's baseline in front, and finds duplicates and what the ledger already has.

    Raises:
        InputError: with the problems of all points together.
    """
    labs, trials = _read_all(request.points)
    if not labs:
        raise InputError("no points to run")
    lab = _one_lab(labs)
    asked = [
        (trial, one.repeat, one.tag, point.overrides)
        for trial, one, point in zip(trials, labs, request.points, strict=True)
    ]
    jobs = _identified(asked, cache=cache_folder(lab))
    if request.study is not None and request.study.baseline:
        jobs = _baselines(jobs) + jobs
    rows = plan_rows(jobs, done=Ledger(Path(lab.root)).finished())
    unique = {(job.fingerprint, job.repeat): job for job in reversed(jobs)}
    return Plan(lab, request.study, tuple(reversed(unique.values())), tuple(rows))


def _read_all(points: Sequence[Composition]) -> tuple[list[Lab], list[Trial]]:
    labs: list[Lab] = []
    trials: list[Trial] = []
    problems: dict[Problem, None] = {}
    for point in points:
        lab_part, trial_part = _split(point.mapping)
        try:
            labs.append(read_lab(lab_part))
        except InputError as error:
            problems.update(dict.fromkeys(error.problems))
        try:
            trials.append(with_known_shape(read_trial(trial_part)))
        except InputError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise InputError(problems)
    return labs, trials


def _split(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    lab = {key: value for key, value in mapping.items() if key in LAB_KEYS}
    return lab, {key: value for key, value in mapping.items() if key not in LAB_KEYS}


def _one_lab(labs: Sequence[Lab]) -> Lab:
    """The housekeeping all points share."""
    first = labs[0]
    problems = [
        Problem(key, f"must be the same for all points of a sweep, got {getattr(first, key)} and {getattr(lab, key)}")
        for key in Lab.model_fields
        if key not in _PER_POINT
        for lab in labs
        if getattr(lab, key) != getattr(first, key)
    ]
    if problems:
        raise InputError(dict.fromkeys(problems))
    return first


def _baselines(jobs: Sequence[Job]) -> list[Job]:
    """The untouched base of every job, each once."""
    bases = [
        job_of(
            job.trial.model_copy(update={"method": Method(kind="base")}),
            job.identities,
            train_rows=job.train_rows,
            repeat=0,
            tag=None,
            overrides=("method=base",),
        )
        for job in jobs
    ]
    return list({base.fingerprint: base for base in bases}.values())


def _identified(asked: Sequence[tuple[Trial, int, str | None, tuple[str, ...]]], *, cache: Path) -> list[Job]:
    jobs: list[Job] = []
    problems: dict[Problem, None] = {}
    known: dict[tuple[str, ...], tuple[dict[str, str], int | None]] = {}
    for trial, repeat, tag, overrides in asked:
        key = tuple(section.model_dump_json() for section in (trial.model, trial.data, trial.evaluation))
        try:
            if key not in known:
                extra = evaluation_identities(trial.evaluation, cache=cache)
                known[key] = identities_of(trial, cache=cache, extra=extra), count_train_rows(trial.data)
            identities, train_rows = known[key]
            jobs.append(job_of(trial, identities, train_rows=train_rows, repeat=repeat, tag=tag, overrides=overrides))
        except InputError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise InputError(problems)
    return jobs
