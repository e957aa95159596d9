"""Which runs are trained together: jobs that can share one loaded base, as cohorts; the others by themselves.

A cohort has seats and a queue. Every seated member adds one micro-batch of its own rows to each tick (one forward and
backward pass for all); when a member's training ends, the next of the queue takes its seat. Members take seats longest
first: Graham's LPT rule (1969), by which the ticks of a cohort are at most 4/3 - 1/(3 seats) of the fewest possible, so
that no long run is left to go on alone behind the others.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_lab.plan.job import Job
from lora_lab.plan.steps import steps_of
from lora_lab.schema.adaptation import Quantization
from lora_lab.schema.method import FUSED_KINDS, PROMPT_KINDS
from lora_lab.schema.model import Model
from lora_lab.schema.optimization import Sophia
from lora_lab.schema.trial import Trial

_ID_DIGITS = 8
# The role of the run whose trained weights lie under a trial (record/parents.py: WEIGHTS).
_WEIGHTS_ROLE = "init_weights"


@dataclass(frozen=True, slots=True)
class BaseKey:
    """What a loaded base is made of: jobs that agree in it can use the same one, one after another.

    identity: declared, of the model's files. weights: fingerprint of the run whose trained weights are the base.
    """

    identity: str
    weights: str | None
    model: Model
    quantization: Quantization
    precision: str


@dataclass(frozen=True, slots=True)
class CohortKey:
    """What the members of a cohort have in common. All else may differ: rank, target, optimizer, data, length, seed."""

    base: BaseKey
    gradient_checkpointing: str | int


@dataclass(frozen=True, slots=True)
class PlannedCohort:
    """Jobs that are trained together, in the order in which they take seats; or one job alone.

    seats: how many are trained at a time; None where a probe of the free memory decides (launch.cohort=auto).
    why_alone: for a cohort of one, why nobody else is in it.
    """

    id: str
    jobs: tuple[Job, ...]
    seats: int | None
    why_alone: str | None
    key: CohortKey


def cohort_key(job: Job) -> CohortKey:
    """What another job must agree in to be trained together with this one."""
    trial = job.trial
    base = BaseKey(
        identity=job.identities["base"],
        weights=job.identities.get(_WEIGHTS_ROLE),
        model=trial.model,
        quantization=trial.quantization,
        precision=trial.training.precision,
    )
    return CohortKey(base, trial.training.gradient_checkpointing)


def why_not_fused(trial: Trial) -> str | None:
    """Why a trial can share no forward pass with others, whoever they are; None where it can."""
    method = trial.method
    if method.trains == "nothing":
        return f"method={method.kind} trains nothing"
    if method.trains == "weights":
        return f"method={method.kind} trains weights of the base, which the members of a cohort share"
    if method.kind in PROMPT_KINDS:
        return f"method={method.kind} puts virtual tokens in front of its rows, which packed rows have no place for"
    if method.kind not in FUSED_KINDS:
        return f"method={method.kind} has no fused form"
    if trial.quantization.kind == "int8":
        return "an int8 base rounds the rows of a batch together, so that a run would depend on its company"
    if isinstance(trial.optimizer, Sophia):
        return "sophia estimates curvature in passes of its own"
    return None


def plan_cohorts(
    jobs: Sequence[Job],
    *,
    cohort: Literal["auto", "off"] | int,
    done: Container[tuple[str, int]] = (),
    devices: int = 1,
) -> list[PlannedCohort]:
    """Every job that is to run, in exactly one cohort; the same cohorts for the same jobs, always.

    Those on one base stand together, so that it is loaded once; among them those that train the base's own weights come
    last. All else keeps the jobs' order.

    Args:
        cohort: as `launch.cohort`. Of N seats a cohort gets no more than it has members.
        done: (fingerprint, repeat) of the runs that need not be run again.
        devices: so many cohorts are made of the jobs that could be one, of about equal length.

    Raises:
        InputError: from `steps_of`, for a schedule that does not fit.
    """
    new: dict[tuple[str, int], Job] = {}
    for job in jobs:
        if (job.fingerprint, job.repeat) not in done:
            new.setdefault((job.fingerprint, job.repeat), job)
    by_base: dict[BaseKey, list[Job]] = {}
    for job in new.values():
        by_base.setdefault(cohort_key(job).base, []).append(job)
    planned: list[PlannedCohort] = []
    for members in by_base.values():
        planned += _cohorts_on_one_base(members, cohort=cohort, devices=devices)
    return planned


def _cohorts_on_one_base(
    jobs: Sequence[Job], *, cohort: Literal["auto", "off"] | int, devices: int
) -> list[PlannedCohort]:
    groups: dict[Hashable, list[Job]] = {}
    reasons: dict[Hashable, str] = {}
    for job in jobs:
        why = why_not_fused(job.trial) or ("launch.cohort=off" if cohort == "off" else None)
        key: Hashable = cohort_key(job) if why is None else (job.fingerprint, job.repeat)
        groups.setdefault(key, []).append(job)
        if why is not None:
            reasons[key] = why
    cohorts = [
        _cohort(part, of=len(members), cohort=cohort, why_alone=reasons.get(key))
        for key, members in groups.items()
        for part in _dealt_out(members, devices)
    ]
    return sorted(cohorts, key=lambda one: one.jobs[0].trial.method.trains == "weights")


def _cohort(
    jobs: Sequence[Job], *, of: int, cohort: Literal["auto", "off"] | int, why_alone: str | None
) -> PlannedCohort:
    if len(jobs) == 1 and why_alone is None:
        why_alone = (
            f"each of the {of} runs that could share its base has a device of its own"
            if of > 1
            else "no other new run shares its model, quantization, precision and gradient checkpointing"
        )
    seats = min(cohort, len(jobs)) if isinstance(cohort, int) else 1 if len(jobs) == 1 else None
    return PlannedCohort(_id_of(jobs), tuple(jobs), seats, why_alone, cohort_key(jobs[0]))


def _dealt_out(jobs: Sequence[Job], devices: int) -> list[list[Job]]:
    """The jobs, longest first, each to the device that has least to do; as many parts as there is work for.

    A length that is not known counts as the longest that is, and stands before it.
    """
    known = {id(job): work for job in jobs if (work := _work_of(job)) is not None}
    unknown = (math.inf, math.inf)
    ordered = sorted(jobs, key=lambda job: known.get(id(job), unknown), reverse=True)
    longest = max((ticks for ticks, _ in known.values()), default=1)
    parts: list[list[Job]] = [[] for _ in range(min(devices, len(jobs)))]
    loads = [(0, index) for index in range(len(parts))]
    for job in ordered:
        load, index = loads[0]
        parts[index].append(job)
        heapq.heapreplace(loads, (load + known.get(id(job), (longest, 0))[0], index))
    return parts


def _work_of(job: Job) -> tuple[int, int] | None:
    """Ticks a job holds its seat for, and rows it reads in them; None where the number of steps is not known."""
    steps = steps_of(job.trial, job.train_rows)
    if steps is None:
        return None
    return steps.steps * steps.micro_batches_per_step, steps.steps * job.trial.training.batch_size


def _id_of(jobs: Iterable[Job]) -> str:
    """Of the members, whatever their order: `c-` and eight hexadecimal digits."""
    members = sorted(f"{job.fingerprint}.r{job.repeat}" for job in jobs)
    return f"c-{hashlib.sha256(' '.join(members).encode()).hexdigest()[:_ID_DIGITS]}"
