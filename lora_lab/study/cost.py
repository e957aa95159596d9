"""What a setting costs: memory as the largest over its runs, time as the median over runs that had the machine alone.

Scores may be reused, time and memory never are: a time counts only if its run was executed alone, and only where all
runs of the setting ran on one kind of machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from lora_lab.record.result import Result
from lora_lab.record.run_record import RunRecord

# A completed run with its result.
CompletedRun = tuple[RunRecord, Result]


def cost_of(completed: Sequence[CompletedRun]) -> tuple[dict[str, float | int], dict[str, str]]:
    """Bytes, seconds and speeds by name, and why each that some run lacks is absent."""
    names = dict.fromkeys(name for _, result in completed for name in result.measurements)
    cost: dict[str, float | int] = {}
    missing: dict[str, str] = {}
    for name in names:
        if name.endswith("_bytes"):
            cost[name] = max(_values(name, completed))
        elif _is_time(name):
            timed, why = timed_runs(completed)
            if why is not None:
                missing[name] = why
            elif values := _values(name, timed):
                cost[name] = statistics.median(values)
    for _, result in completed:
        for name, reason in result.missing.items():
            if name not in cost and (name.endswith("_bytes") or _is_time(name)):
                missing.setdefault(name, reason)
    return cost, missing


def timed_runs(completed: Sequence[CompletedRun]) -> tuple[list[CompletedRun], str | None]:
    """The runs whose times count: those that had the machine alone; or none, and why."""
    alone = [(record, result) for record, result in completed if result.facts.get("executed") == "alone"]
    if not alone:
        return [], "no run was executed alone"
    count = len(machines_of(alone))
    return ([], f"the runs come from {count} different machines") if count > 1 else (alone, None)


def machines_of(runs: Iterable[CompletedRun]) -> set[str | None]:
    """The machines that made these runs."""
    return {record.header.machine_id for record, _ in runs if record.header is not None}


def _is_time(name: str) -> bool:
    return name.endswith(("_seconds", "_per_second"))


def _values(name: str, completed: Sequence[CompletedRun]) -> list[float | int]:
    return [result.measurements[name] for _, result in completed if name in result.measurements]
