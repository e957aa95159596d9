"""What a setting costs: memory as the largest over its runs, time as the median over runs that had the machine alone.

Scores may be reused, time and memory never are: a time counts only if its run was executed alone, and only where all
runs of the setting ran on one kind of machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lora_lab.record.result import Result
from lora_lab.record.run_record import RunRecord


def cost_of(completed: Sequence[tuple[RunRecord, Result]]) -> tuple[dict[str, float | int], dict[str, str]]:
    """Bytes, seconds and speeds by name, and why each that some run lacks is absent."""
    names = dict.fromkeys(name for _, result in completed for name in result.measurements)
    cost: dict[str, float | int] = {}
    missing: dict[str, str] = {}
    for name in names:
        if name.endswith("_bytes"):
            cost[name] = max(_values(name, completed))
        elif _is_time(name):
            alone = [(record, result) for record, result in completed if result.facts.get("executed") == "alone"]
            machines = {record.header.machine_id for record, _ in alone if record.header is not None}
            if not alone:
                missing[name] = "no run was executed alone"
            elif len(machines) > 1:
                missing[name] = f"the runs come from {len(machines)} different machines"
            elif values := _values(name, alone):
                cost[name] = statistics.median(values)
    for _, result in completed:
        for name, reason in result.missing.items():
            if name not in cost and (name.endswith("_bytes") or _is_time(name)):
                missing.setdefault(name, reason)
    return cost, missing


def _is_time(name: str) -> bool:
    return name.endswith(("_seconds", "_per_second"))


def _values(name: str, completed: Sequence[tuple[RunRecord, Result]]) -> list[float | int]:
    return [result.measurements[name] for _, result in completed if name in result.measurements]
