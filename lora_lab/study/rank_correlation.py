"""Spearman's rank correlation, with a p value that is exact where there are few values.

`scipy.special` has what `scipy.stats` wraps and imports ten times faster; a test compares them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

# Up to so many values all orders are gone through (40,320); scipy.stats warns against its approximation there.
_EXACT_UP_TO = 8
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """rho in -1..1 over `n` pairs, and the two-sided p value of "no order": over all orders (`permutations`), or by
    Student's t with n - 2 degrees of freedom (`t`), which is scipy.stats.spearmanr's."""

    rho: float
    p_value: float
    n: int
    method: Literal["permutations", "t"]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {"rho": self.rho, "p_value": self.p_value, "n": self.n, "method": self.method}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> RankCorrelation | None:
    """Spearman's rho (1904): Pearson's correlation of ranks, ties by their mean rank.

    None with fewer than three pairs, or where all of x or all of y are equal.

    Raises:
        ValueError: of unequal length, or a value that is not finite.
    """
    if len(x) != len(y):
        raise ValueError(f"expected as many y as x ({len(x)}), got {len(y)}")
    if not all(map(math.isfinite, (*x, *y))):
        raise ValueError("ranks need finite values")
    if len(x) < _FEWEST or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    a, b = _standard_ranks(x), _standard_ranks(y)
    rho = min(max(float(a @ b), -1.0), 1.0)
    if len(x) > _EXACT_UP_TO:
        return RankCorrelation(rho, _t_p_value(rho, len(x)), len(x), "t")
    p_value = float((np.abs(b[_orders(len(b))] @ a) >= abs(rho) - 1e-9).mean())
    return RankCorrelation(rho, p_value, len(x), "permutations")


@cache
def _orders(n: int) -> NDArray[np.intp]:
    return np.array(list(itertools.permutations(range(n))))


def _standard_ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from their mean, divided by their length: the product of two such is their correlation."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[:, None] > array).sum(axis=1)
    equal = (array[:, None] == array).sum(axis=1)
    centred: NDArray[np.float64] = below + equal / 2 - len(array) / 2
    return centred / np.linalg.norm(centred)


def _t_p_value(rho: float, n: int) -> float:
    if abs(rho) >= 1:
        return 0.0
    t = rho * math.sqrt((n - 2) / ((1 - rho) * (1 + rho)))
    return 2 * float(special.stdtr(n - 2, -abs(t)))
