"""What each axis does to a metric: settings that differ in it alone, compared seed by seed.

Assumed: runs of equal seed belong together. They see the same data in the same order and draw from the same generators,
so what a seed does to both sides drops out of the difference. (Weights of different shapes start differently all the
same; pairing then gains less, and is no less valid.) The interval covers seeds, on these settings and these examples;
it says nothing about other settings, and is not corrected for the number of effects looked at. Settings of which a
search has stopped runs early have no part in it (`SettingRow.incomparable`).
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.study.axes import Axis, SweptAxes
from lora_lab.study.cells import Cell
from lora_lab.study.interval import Interval, t_interval
from lora_lab.study.table import SettingsTable

# As in the table: with fewer seeds an interval says nothing.
SEEDS_FOR_INTERVAL = 3
# A spread below this share of the mean is rounding.
_ROUNDING = 1e-9

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Effect:
    """How a metric changes from an axis's value `low` to `high`: score at high - score at low.

    `per_seed`: the difference of each seed, averaged over the `pairs` of settings, which are the same for every seed.
    `difference`: their mean; `interval` only from three seeds on. `left_out`: matched pairs that lack one of the seeds.
    `along`: what moved together with the axis in these pairs. `is_whole_range`: from the first to the last value of an
    axis, not between neighbours. Without a difference `missing` says why.
    """

    axis: str
    low: Any
    high: Any
    metric: str
    difference: float | None
    interval: Interval | None
    per_seed: dict[int, float]
    pairs: int
    left_out: int
    along: tuple[str, ...]
    is_whole_range: bool
    missing: str | None

    @property
    def seeds(self) -> int:
        """How many seeds were compared."""
        return len(self.per_seed)

    @property
    def is_clear(self) -> bool:
        """Whether the interval does not hold 0, by itself: with many effects some are clear by chance."""
        interval = self.interval
        return interval is not None and has_spread(interval) and abs(interval.mean) > interval.half_width

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "axis": self.axis,
            "low": self.low,
            "high": self.high,
            "metric": self.metric,
            "difference": self.difference,
            "interval": None if self.interval is None else self.interval.to_json(),
            "is_clear": self.is_clear,
            "seeds": self.seeds,
            "per_seed": {str(seed): value for seed, value in self.per_seed.items()},
            "pairs": self.pairs,
            "left_out": self.left_out,
            "along": list(self.along),
            "is_whole_range": self.is_whole_range,
            "missing": self.missing,
        }


def has_spread(interval: Interval) -> bool:
    """Whether the values differ by more than rounding. Scores of few examples fall on a coarse grid, where three seeds
    may well gain the same: an interval of no width says nothing about chance."""
    return interval.standard_error > _ROUNDING * abs(interval.mean)


def scores_by_seed(cell: Cell) -> dict[int, float]:
    """A setting's scores by seed; empty where two of its runs share one (they differ in `seeds.*`), since nothing says
    which of them belongs to which run of another setting."""
    seeds = Counter(point.seed for point in cell.points)
    if any(seed is None or count > 1 for seed, count in seeds.items()):
        return {}
    return {point.seed: point.value for point in cell.points if point.seed is not None}


def effects_of(table: SettingsTable, axes: SweptAxes, metric: str) -> tuple[Effect, ...]:
    """The effects of all axes on one metric: between neighbouring values, and of numbers from the first to the last.

    Values are neighbours among those that can be compared: a learning rate that only full fine-tuning had stands in no
    row with the adapters' rates. A value that differs from no other in this axis alone is listed with that reason.

    Raises:
        InputError: the table has no such metric.
    """
    names = [column.name for column in table.columns]
    if metric not in names:
        raise InputError(Problem("metric", f'the table has no "{metric}"' + nearest(metric, names)))
    compared = [row for row in table.rows if not row.is_base and row.incomparable is None]
    scores = {row.setting: scores_by_seed(row.cells[metric]) for row in compared}
    return tuple(effect for axis in axes.axes for effect in _axis_effects(axes, axis, metric, scores))


def _axis_effects(axes: SweptAxes, axis: Axis, metric: str, scores: Mapping[str, Mapping[int, float]]) -> list[Effect]:
    matched = _pairs_by_values(axes, axis)
    if not matched:
        ends = (0, len(axis.values) - 1)
        return [_effect(axes, axis, ends, metric, [], scores, is_whole_range=False)]
    steps: dict[tuple[int, int], bool] = {}  # places of two values on the axis: whether they are the ends of a range
    for chain in _chains(len(axis.values), matched):
        steps |= dict.fromkeys(itertools.pairwise(chain), False)
        if axis.is_numeric and len(chain) > 2:
            steps[chain[0], chain[-1]] = True
        if len(chain) == 1:
            (alone,) = chain
            steps.setdefault((alone - 1, alone) if alone else (0, 1), False)
    return [
        _effect(axes, axis, places, metric, matched.get(places, []), scores, is_whole_range=is_whole_range)
        for places, is_whole_range in steps.items()
    ]


def _pairs_by_values(axes: SweptAxes, axis: Axis) -> dict[tuple[int, int], list[Pair]]:
    """The matched pairs by the places of their two values on the axis."""
    places = {
        setting: axis.values.index(values[axis.name])
        for setting, values in axes.settings.items()
        if axis.name in values
    }
    found: dict[tuple[int, int], list[Pair]] = {}
    for low, high in axis.matched:
        found.setdefault((places[low], places[high]), []).append((low, high))
    return found


def _chains(count: int, matched: Mapping[tuple[int, int], Sequence[Pair]]) -> list[list[int]]:
    """Places that matched pairs connect, directly or through others; each chain ascending."""
    chain_of = list(range(count))
    for low, high in matched:
        old, new = chain_of[high], chain_of[low]
        chain_of = [new if chain == old else chain for chain in chain_of]
    return [[place for place in range(count) if chain_of[place] == chain] for chain in dict.fromkeys(chain_of)]


def _effect(
    axes: SweptAxes,
    axis: Axis,
    places: tuple[int, int],
    metric: str,
    pairs: Sequence[Pair],
    scores: Mapping[str, Mapping[int, float]],
    *,
    is_whole_range: bool,
) -> Effect:
    seeds, used = _complete(pairs, scores)
    per_seed = {seed: statistics.fmean(scores[high][seed] - scores[low][seed] for low, high in used) for seed in seeds}
    return Effect(
        axis=axis.name,
        low=axis.values[places[0]],
        high=axis.values[places[1]],
        metric=metric,
        difference=statistics.fmean(per_seed.values()) if per_seed else None,
        interval=t_interval(list(per_seed.values())) if len(per_seed) >= SEEDS_FOR_INTERVAL else None,
        per_seed=per_seed,
        pairs=len(used),
        left_out=len(pairs) - len(used),
        along=axes.along(axis, used or pairs),
        is_whole_range=is_whole_range,
        missing=None if per_seed else _why_missing(axis, pairs, scores),
    )


def _why_missing(axis: Axis, pairs: Sequence[Pair], scores: Mapping[str, Mapping[int, float]]) -> str:
    if not pairs:
        return f"no two settings differ in {axis.name} alone"
    if not any(low in scores and high in scores for low, high in pairs):
        return "runs of one side were stopped early"
    return "no seed has a score on both sides"


def _complete(pairs: Sequence[Pair], scores: Mapping[str, Mapping[int, float]]) -> tuple[list[int], list[Pair]]:
    """Seeds and pairs such that every pair has every seed on both sides.

    Of the seeds that some pair has in full, those that keep the most differences, at least three seeds where possible.
    Which scores are there decides, never what they are.
    """
    common = {pair: frozenset(scores.get(pair[0], {}).keys() & scores.get(pair[1], {}).keys()) for pair in pairs}
    best: tuple[tuple[bool, int, int], frozenset[int], list[Pair]] = ((False, 0, 0), frozenset(), [])
    for seeds in dict.fromkeys([*common.values(), frozenset.intersection(*common.values())] if common else []):
        having = [pair for pair in pairs if common[pair] >= seeds]
        worth = (len(seeds) >= SEEDS_FOR_INTERVAL, len(seeds) * len(having), len(seeds))
        if seeds and worth > best[0]:
            best = (worth, seeds, having)
    return sorted(best[1]), best[2]
