"""One line of a plan: what a job would do and cost, before anything is loaded."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lora_lab.errors import InputError, Problem
from lora_lab.plan.cohorts import PlannedCohort
from lora_lab.plan.counts import counts_of
from lora_lab.plan.job import Job
from lora_lab.plan.steps import steps_of

RowState = Literal["new", "done", "duplicate"]
_COUNTS = ("trainable_parameters", "adapter_parameters", "router_parameters", "total_parameters")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One job of a plan. `missing` says for each number that is None why it is not known.

    cohort: id of the cohort that trains it, None where it runs alone (`why_alone`). cohort_size: members of it, itself
    included. All three are None for what does not run: `done`, `duplicate`.
    """

    name: str
    fingerprint: str
    setting: str
    repeat: int
    state: RowState
    steps: int | None
    train_rows: int | None
    trainable_parameters: int | None
    adapter_parameters: int | None
    router_parameters: int | None
    total_parameters: int | None
    overrides: tuple[str, ...]
    missing: Mapping[str, str]
    cohort: str | None
    cohort_size: int | None
    why_alone: str | None


def plan_rows(
    jobs: Iterable[Job], *, done: Container[tuple[str, int]], cohorts: Iterable[PlannedCohort] = ()
) -> list[PlanRow]:
    """A row per job, in order: `duplicate` where an earlier one is the same, `done` where the ledger has it.

    Args:
        done: (fingerprint, repeat) of the runs that need not be run again.
        cohorts: of the same jobs, as `plan_cohorts` makes them.

    Raises:
        InputError: with the problems of all jobs whose target or schedule does not fit.
    """
    rows: list[PlanRow] = []
    seen: set[tuple[str, int]] = set()
    problems: dict[Problem, None] = {}
    places = {(job.fingerprint, job.repeat): one for one in cohorts for job in one.jobs}
    for job in jobs:
        key = job.fingerprint, job.repeat
        state: RowState = "duplicate" if key in seen else "done" if key in done else "new"
        seen.add(key)
        try:
            rows.append(_row(job, state, places.get(key) if state == "new" else None))
        except InputError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise InputError(problems)
    return rows


def _row(job: Job, state: RowState, cohort: PlannedCohort | None) -> PlanRow:
    counts, step_plan, missing = counts_of(job.trial), steps_of(job.trial, job.train_rows), {}
    steps = 0 if job.trial.method.kind == "base" else None if step_plan is None else step_plan.steps
    if counts is None:
        model = job.trial.model
        reason = f"the shape of {model.name or model.kind} is not known without its files (model.shape gives it)"
        missing.update(dict.fromkeys(_COUNTS, reason))
    elif counts.trainable_parameters is None:
        missing["trainable_parameters"] = "drawn anew in every period"
    if job.train_rows is None:
        missing["train_rows"] = "the data set has not been counted on this machine"
    if steps is None:
        missing["steps"] = "epochs of an unknown number of training rows"
    return PlanRow(
        name=job.name,
        fingerprint=job.fingerprint,
        setting=job.setting,
        repeat=job.repeat,
        state=state,
        steps=steps,
        train_rows=job.train_rows,
        trainable_parameters=None if counts is None else counts.trainable_parameters,
        adapter_parameters=None if counts is None else counts.adapter_parameters,
        router_parameters=None if counts is None else counts.router_parameters,
        total_parameters=None if counts is None else counts.total_parameters,
        overrides=job.overrides,
        missing=missing,
        cohort=None if cohort is None or cohort.why_alone is not None else cohort.id,
        cohort_size=None if cohort is None else len(cohort.jobs),
        why_alone=None if cohort is None else cohort.why_alone,
    )
