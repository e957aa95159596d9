"""The cohorts of some runs, as the results of their members tell them.

Every member's result holds what the cohort shared up to the member's end. The shared numbers of a cohort are therefore
those of the member that saw most of it (the longest `cohort_wall_seconds`); the peak of memory is the largest any
member saw. Steps and tokens are sums of the members' own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.record.cohort_facts import SHARED, CohortFacts, cohort_of
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunRecord

WALL, TRAIN = f"{SHARED}wall_seconds", f"{SHARED}train_seconds"
SPEED, PEAK = f"{SHARED}tokens_per_second", f"{SHARED}peak_allocated_bytes"
_OWN = ("steps", "tokens")


@dataclass(frozen=True, slots=True)
class Shared:
    """A number that the members share, and the run whose result file holds it."""

    value: float | int
    run_id: str


@dataclass(frozen=True, slots=True)
class Cohort:
    """`members`: run ids, those with a result among the given runs first; `ended`: how many have one. `own`: sums of
    these members' `steps` and `tokens`. `shared`: by name of the measurement; `missing` says why one is absent."""

    id: str
    seats: int
    members: tuple[str, ...]
    ended: int
    own: dict[str, int]
    shared: dict[str, Shared]
    missing: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """All fields; of shared numbers the value and the run that told it."""
        return {
            "id": self.id,
            "seats": self.seats,
            "members": list(self.members),
            "ended": self.ended,
            **self.own,
            "shared": {name: {"value": one.value, "run_id": one.run_id} for name, one in self.shared.items()},
            "missing": self.missing,
        }


def cohorts_of(records: Iterable[RunRecord]) -> tuple[Cohort, ...]:
    """The cohorts that these runs were trained in, in the order of the runs."""
    members: dict[str, list[tuple[Result, CohortFacts]]] = {}
    for record in records:
        if record.result is not None and (facts := cohort_of(record.result)) is not None:
            members.setdefault(facts.id, []).append((record.result, facts))
    return tuple(_cohort(name, told) for name, told in members.items())


def _cohort(name: str, told: Sequence[tuple[Result, CohortFacts]]) -> Cohort:
    results = [result for result, _ in told]
    last = max(results, key=lambda result: (result.measurements.get(WALL, 0), result.finished_at))
    shared = {key: Shared(last.measurements[key], last.run_id) for key in (WALL, TRAIN, SPEED) if _has(last, key)}
    peaks = [Shared(result.measurements[PEAK], result.run_id) for result in results if _has(result, PEAK)]
    if peaks:
        shared[PEAK] = max(peaks, key=lambda one: one.value)
    ids = [result.run_id for result in results] + [one for _, facts in told for one in facts.members]
    return Cohort(
        id=name,
        seats=max(facts.seats for _, facts in told),
        members=tuple(dict.fromkeys(ids)),
        ended=len(results),
        own={key: sum(int(result.measurements.get(key, 0)) for result in results) for key in _OWN},
        shared=shared,
        missing={key: last.missing.get(key, "not measured") for key in (WALL, TRAIN, SPEED, PEAK) if key not in shared},
    )


def _has(result: Result, name: str) -> bool:
    return name in result.measurements
