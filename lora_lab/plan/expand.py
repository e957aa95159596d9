"""From a study to its points: one flat mapping of configuration keys to values per trial, not yet composed.

Points that mean the same trial are kept; the fingerprint merges them later, where it is known that they do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from lora_lab.schema.design import Design, Grid, Value


def count(study: Design) -> int:
    """How many points `expand` gives, without making them; the baseline is not one of them."""
    return sum(math.prod(_length(axes) for axes in grid.dimensions) for grid in study.grids) * max(1, len(study.seeds))


def expand(study: Design) -> list[dict[str, Value]]:
    """Every point of every grid: values of `base`, then those of the grid, then the seed.

    Of a grid the first axis varies slowest, and the seed fastest. A grid without axes is one point.
    """
    seeds: list[dict[str, Value]] = [{"seed": seed} for seed in study.seeds] or [{}]
    return [study.base | point | seed for grid in study.grids for point in _points(grid) for seed in seeds]


def _points(grid: Grid) -> Iterator[dict[str, Value]]:
    for indices in itertools.product(*(range(_length(axes)) for axes in grid.dimensions)):
        yield {
            key: axis[index] for axes, index in zip(grid.dimensions, indices, strict=True) for key, axis in axes.items()
        }


def _length(axes: dict[str, tuple[Value, ...]]) -> int:
    """Zipped axes are equally long (the schema requires it), so any of them tells."""
    return len(next(iter(axes.values())))
