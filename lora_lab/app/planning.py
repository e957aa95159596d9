"""From composed points to jobs: every trial read and checked, identified, counted, and looked up in the ledger."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.app.judgement import Facts, Findings, judge
from lora_lab.app.request import Request
from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.cohorts import plan_cohorts
from lora_lab.plan.job import Job, job_of
from lora_lab.plan.row import PlanRow, plan_rows
from lora_lab.plan.study_file import value_key
from lora_lab.record.flat import dotted
from lora_lab.record.ledger import Ledger
from lora_lab.record.parents import PARENT_ROLES, LedgerAsRead, parent_identities
from lora_lab.schema.study import Study
from lora_lab.schema.trial import Lab, Trial
from lora_lab.schema.weight_methods import Base, Lisa

# Housekeeping that may differ between the points of one sweep.
_PER_POINT = ("study", "tag", "repeat")
_SECTIONS_OF_PARENTS = frozenset({"model", "method", "quantization", "target", "rank", "init_from", "init_as"})


@dataclass(frozen=True, slots=True)
class Plan:
    """`rows` says of every asked-for job what is known; `jobs` are those without duplicates, in order.

    notes: sentences about the data that a user should read before a run.
    """

    lab: Lab
    study: Study | None
    jobs: tuple[Job, ...]
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]


def cache_folder(lab: Lab) -> Path:
    """Where converted models, generated tasks and hashes are kept."""
    return Path(lab.cache) if lab.cache is not None else Path(lab.root) / "cache"


def make_plan(request: Request) -> Plan:
    """Reads all points, adds the study's baseline in front, and finds duplicates and what the ledger already has.

    Raises:
        InputError: with everything that can be known to be wrong before a weight is read, of all points together.
    """
    found = Findings()
    found.add(request.problems)
    facts = _facts(request)
    judged = [judge(point, facts, found) for point in request.points]
    trials = [trial for _, trial in judged]
    found.add(_metric_problems(request, trials))
    labs = [lab for lab, _ in judged if lab is not None]
    if not labs or facts is None:
        found.raise_if_any()
        raise InputError("no points to run")
    found.add(_lab_problems(labs))
    ledger = LedgerAsRead(Path(labs[0].root))
    parents = [found.attempt(functools.partial(_parents, trial, ledger, facts)) or {} for trial in trials]
    found.raise_if_any()
    jobs = [
        _job(trial, facts, lab, built_on, overrides=point.overrides)
        for lab, trial, built_on, point in zip(labs, trials, parents, request.points, strict=True)
    ]
    if request.study is not None and request.study.baseline:
        jobs = _baselines(jobs) + jobs
    launch = labs[0].launch
    done = ledger.finished(launch.stopping)
    # How many devices `auto` stands for only torch can tell: it is planned as one.
    devices = len(launch.device) if isinstance(launch.device, tuple) else 1
    cohorts = plan_cohorts(jobs, cohort=launch.cohort, done=done, devices=devices)
    rows = plan_rows(jobs, done=done, cohorts=cohorts)
    unique = {(job.fingerprint, job.repeat): job for job in reversed(jobs)}
    return Plan(labs[0], request.study, tuple(reversed(unique.values())), tuple(rows), tuple(facts.notes))


def _facts(request: Request) -> Facts | None:
    """None where no point says in a usable way where the cache is."""
    for point in request.points:
        root, cache = point.mapping.get("root"), point.mapping.get("cache")
        named = root if cache is None else cache
        if isinstance(named, str) and named.strip():
            folder = Path(named) / "cache" if cache is None else Path(named)
            return Facts(folder, needs_weights=request.needs_weights)
    return None


def _parents(trial: Trial, ledger: Ledger, facts: Facts) -> dict[str, str]:
    """Fingerprints of the runs that a trial is built on: none for most, nor where what decides it has problems."""
    has = trial.model_fields_set
    builds = "method" in has and (
        isinstance(trial.method, Lisa) or ("init_from" in has and trial.init_from is not None)
    )
    if not builds or not has >= _SECTIONS_OF_PARENTS:
        return {}
    base = facts.base(trial, Findings())
    return {} if base is None else parent_identities(trial, ledger, base=base["base"])


def _job(trial: Trial, facts: Facts, lab: Lab, parents: dict[str, str], *, overrides: tuple[str, ...]) -> Job:
    identities, train_rows = facts.identities(trial)
    identities |= parents
    return job_of(trial, identities, train_rows=train_rows, repeat=lab.repeat, tag=lab.tag, overrides=overrides)


def _lab_problems(labs: Sequence[Lab]) -> list[Problem]:
    """Housekeeping that all points must share."""
    first = _shared(labs[0])
    return [
        Problem(key, f"must be the same for all points of a sweep, got {first.get(key)} and {value}")
        for lab in labs
        if lab != labs[0]
        for key, value in _shared(lab).items()
        if value != first.get(key)
    ]


def _shared(lab: Lab) -> dict[str, Any]:
    return dotted(lab.model_dump(exclude=set(_PER_POINT)))


def _metric_problems(request: Request, trials: Sequence[Trial]) -> list[Problem]:
    """Metrics of a study that none of its trials will have: a slip that would else show after hours."""
    if request.study is None or not all("evaluation" in trial.model_fields_set for trial in trials):
        return []
    sources = sorted({"heldout", "train", *(task for trial in trials for task in trial.evaluation.tasks)})
    problems = []
    for metric in request.study.metrics:
        name = metric.partition("/")[0]
        if not any(name == source or name.startswith(f"{source}_") for source in sources):
            message = f'metrics: no trial of the study is scored on "{metric}"' + nearest(name, sources)
            problems.append(Problem(request.places[value_key("metrics", metric)], message))
    return problems


def _baselines(jobs: Sequence[Job]) -> list[Job]:
    """The untouched base of every job, each once."""
    bases = [
        job_of(
            job.trial.model_copy(update={"method": Base(kind="base"), "init_from": None}),
            {role: identity for role, identity in job.identities.items() if role not in PARENT_ROLES},
            train_rows=job.train_rows,
            repeat=0,
            tag=None,
            overrides=("method=base",),
        )
        for job in jobs
    ]
    return list({base.fingerprint: base for base in bases}.values())
