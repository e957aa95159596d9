"""What a setting costs: memory as the largest over its runs, time as the median over runs that had the machine alone.

Scores may be reused, time and memory never are. A time counts only if its run was executed alone, and only where all
such runs of the setting ran on one kind of machine. A peak of memory counts unless its run was in a cohort; that of
allocated bytes also there, if the step it was counted on was made alone (`owns_peak`). Sizes (weights, optimizer state,
files) are the run's own in any company. What the runs of a cohort share is no cost of a setting.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence

from lora_lab.record.cohort_facts import SHARED, is_alone, is_together, owns_peak
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunRecord

# A completed run with its result.
CompletedRun = tuple[RunRecord, Result]

_NOT_ALONE = "no run was executed alone"
_PROBED = "peak_allocated_bytes"
# Of the process: in a cohort the peak of all its runs.
_PEAK = re.compile(r"(^|_)peak_")


def cost_of(completed: Sequence[CompletedRun]) -> tuple[dict[str, float | int], dict[str, str]]:
    """Bytes, seconds and speeds by name, and why each that some run lacks is absent."""
    named = [name for _, result in completed for name in (*result.measurements, *result.missing)]
    cost: dict[str, float | int] = {}
    missing: dict[str, str] = {}
    for name in dict.fromkeys(filter(_is_cost, named)):
        runs, why = comparable_runs(completed, name)
        if values := [result.measurements[name] for _, result in runs if name in result.measurements]:
            cost[name] = statistics.median(values) if is_time(name) else max(values)
        else:
            reasons = [result.missing[name] for _, result in runs if name in result.missing]
            missing[name] = why or (reasons[0] if reasons else "not measured")
    return cost, missing


def comparable_runs(completed: Sequence[CompletedRun], name: str) -> tuple[list[CompletedRun], str | None]:
    """The runs whose measurement of that name may be compared between settings, or none and why.

    Any of them may lack it all the same.
    """
    if is_time(name):
        return timed_runs(completed)
    if name == _PROBED:
        own = [(record, result) for record, result in completed if owns_peak(result)]
    elif _PEAK.search(name):
        own = [(record, result) for record, result in completed if not is_together(result)]
    else:
        own = list(completed)
    return own, None if own else _why_none(completed)


def timed_runs(completed: Sequence[CompletedRun]) -> tuple[list[CompletedRun], str | None]:
    """The runs whose times count: those that had the machine alone; or none, and why."""
    alone = [(record, result) for record, result in completed if is_alone(result)]
    if not alone:
        return [], _why_none(completed)
    count = len(machines_of(alone))
    return ([], f"the runs come from {count} different machines") if count > 1 else (alone, None)


def machines_of(runs: Iterable[CompletedRun]) -> set[str | None]:
    """The machines that made these runs."""
    return {record.header.machine_id for record, _ in runs if record.header is not None}


def _why_none(completed: Sequence[CompletedRun]) -> str:
    together = sum(is_together(result) for _, result in completed)
    return _NOT_ALONE + (f" ({together} of {len(completed)} trained in cohorts)" if together else "")


def _is_cost(name: str) -> bool:
    return (name.endswith("_bytes") or is_time(name)) and not name.startswith(SHARED)


def is_time(name: str) -> bool:
    """Whether a measurement is a time or a speed, by its unit."""
    return name.endswith(("_seconds", "_per_second"))
