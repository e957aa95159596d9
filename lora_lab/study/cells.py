"""The score of a setting by one metric: a point per seed, their mean, and an interval where there are seeds enough."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.study.interval import Interval, t_interval

# With fewer seeds an interval says nothing; the points are shown.
_SEEDS_FOR_INTERVAL = 3


@dataclass(frozen=True, slots=True)
class Point:
    """One seed's score; `standard_error` is over its examples."""

    run_id: str
    seed: int | None
    value: float
    standard_error: float | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {"run_id": self.run_id, "seed": self.seed, "value": self.value, "standard_error": self.standard_error}


@dataclass(frozen=True, slots=True)
class Cell:
    """A setting's score by one metric. `interval` only from three seeds on; `missing` says why there are no points."""

    points: tuple[Point, ...]
    mean: float | None
    interval: Interval | None
    missing: str | None

    def to_json(self) -> dict[str, Any]:
        """Mean, interval and points; null where there is none."""
        return {
            "mean": self.mean,
            "interval": None if self.interval is None else self.interval.to_json(),
            "points": [point.to_json() for point in self.points],
            "missing": self.missing,
        }


def cell_of(points: Sequence[Point], missing: str) -> Cell:
    """A cell of these points; `missing` is why where there are none."""
    if not points:
        return Cell((), None, None, missing)
    values = [point.value for point in points]
    interval = t_interval(values) if len(values) >= _SEEDS_FOR_INTERVAL else None
    return Cell(tuple(points), statistics.fmean(values), interval, None)
