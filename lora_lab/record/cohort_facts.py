"""How a run was executed, by its result: alone, or together with others in a cohort, and what is then its own.

What the runs of a cohort share (time, speed, memory of the process) has names that begin with `cohort_`, in
measurements and in lines of the step log; a member's own names never hold a shared number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lab.record.result import Result

SHARED = "cohort_"
ALONE, TOGETHER = "alone", "cohort"
# How the time and memory of one run are measured where it was trained with others.
REMEDY = "launch.cohort=off repeat=1"


@dataclass(frozen=True, slots=True)
class CohortFacts:
    """A result's cohort. seats: how many runs it trains at once; members: ids of the runs that the run was trained
    with at some time, itself included."""

    id: str
    seats: int
    members: tuple[str, ...]


def cohort_of(result: Result | None) -> CohortFacts | None:
    """The cohort that a run was trained in; None for one that ran alone, or whose facts say nothing of it."""
    told = result.facts.get("cohort") if result is not None and is_together(result) else None
    if not isinstance(told, Mapping) or not isinstance(told.get("id"), str):
        return None
    seats, members = told.get("seats"), told.get("members")
    return CohortFacts(
        id=told["id"],
        seats=seats if isinstance(seats, int) else 0,
        members=tuple(map(str, members)) if isinstance(members, (list, tuple)) else (),
    )


def is_alone(result: Result) -> bool:
    """Whether the run had the machine alone, so that its times are its own."""
    return result.facts.get("executed") == ALONE


def is_together(result: Result) -> bool:
    """Whether the run was trained in a cohort."""
    return result.facts.get("executed") == TOGETHER


def owns_peak(result: Result) -> bool:
    """Whether a peak of allocated memory is the run's own: no others were there, or its probe step was made alone."""
    return not is_together(result) or result.facts.get("probe") == ALONE


def shared_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the step log that a cohort's runs share, under the names that say so."""
    return {f"{SHARED}{name}": value for name, value in values.items()}


def why_missing(result: Result | None, name: str) -> str:
    """Why a run has no measurement of that name."""
    if result is None:
        return "the run has not ended"
    if name in result.missing:
        return result.missing[name]
    cohort = cohort_of(result)
    return "not measured" if cohort is None else f"trained in cohort {cohort.id}; {REMEDY} measures it alone"


def short_reason(result: Result | None, name: str) -> str:
    """As `why_missing`, but the same for all runs that cohorts trained, so that many of them make one line."""
    if result is not None and is_together(result):
        return f"trained in cohorts; {REMEDY} measures them alone"
    return why_missing(result, name)
