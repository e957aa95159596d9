"""The Pareto front of settings: those that no other setting beats in both score and cost.

It is drawn through means. Two settings whose intervals overlap may change places with other seeds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.study.table import SettingRow, SettingsTable

_PARAMETERS = "trainable_parameters"


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A setting's mean score and its cost. `on_front`: no other setting is as good in both and better in one."""

    name: str
    setting: str
    is_base: bool
    cost: float | int
    score: float
    on_front: bool

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "name": self.name,
            "setting": self.setting,
            "is_base": self.is_base,
            "cost": self.cost,
            "score": self.score,
            "on_front": self.on_front,
        }


@dataclass(frozen=True, slots=True)
class ParetoFront:
    """`points` by rising cost, of equal cost the better first. `missing`: by setting, why it is no point."""

    metric: str
    cost: str
    higher_is_better: bool
    points: tuple[ParetoPoint, ...]
    missing: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "metric": self.metric,
            "cost": self.cost,
            "higher_is_better": self.higher_is_better,
            "points": [point.to_json() for point in self.points],
            "missing": self.missing,
        }


def pareto_front(table: SettingsTable, metric: str, cost: str) -> ParetoFront:
    """The front of `metric` (in its own direction) against `cost` (less is better).

    `cost` is a measurement of the table (`peak_allocated_bytes`, `train_seconds`) or `trainable_parameters`. Settings
    of equal score and cost are on the front together. An untouched base takes part where it has both.

    Raises:
        InputError: the table has no such metric.
    """
    columns = {column.name: column for column in table.columns}
    if metric not in columns:
        raise InputError(Problem("metric", f'the table has no "{metric}"' + nearest(metric, list(columns))))
    higher_is_better = columns[metric].higher_is_better
    found: list[ParetoPoint] = []
    missing: dict[str, str] = {}
    for row in table.rows:
        score, spent = row.cells[metric].mean, _cost(row, cost)
        if score is None:
            missing[row.setting] = f"no {metric}: {row.cells[metric].missing}"
        elif row.incomparable is not None:
            missing[row.setting] = row.incomparable
        elif spent is None:
            missing[row.setting] = f"no {cost}: {row.why_no_cost(cost)}"
        else:
            found.append(ParetoPoint(row.name, row.setting, row.is_base, spent, score, on_front=False))
    sign = -1 if higher_is_better else 1
    found.sort(key=lambda point: (point.cost, sign * point.score))
    return ParetoFront(metric, cost, higher_is_better, tuple(_with_front(found, sign)), missing)


def _cost(row: SettingRow, cost: str) -> float | int | None:
    return row.trainable_parameters if cost == _PARAMETERS else row.cost.get(cost)


def _with_front(points: list[ParetoPoint], sign: int) -> list[ParetoPoint]:
    """Points by cost, then score: one is on the front if it beats all that are cheaper, and none as dear is better."""
    marked: list[ParetoPoint] = []
    best = math.inf
    for _, group in itertools.groupby(points, key=attrgetter("cost")):
        equals = list(group)
        top = sign * equals[0].score
        for point in equals:
            on_front = sign * point.score == top < best
            marked.append(ParetoPoint(point.name, point.setting, point.is_base, point.cost, point.score, on_front))
        best = min(best, top)
    return marked
