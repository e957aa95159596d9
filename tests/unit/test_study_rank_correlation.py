"""Spearman's rho and its p value against scipy, and by hand where scipy only approximates."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from scipy import stats

from lora_lab.study.rank_correlation import rank_correlation


def test_by_hand() -> None:
    """Ranks 1 2 3 4 against 2 1 4 3: sum d^2 = 4, rho = 1 - 6 * 4 / (4 * 15) = 0.6. Of the 24 orders those with
    sum d^2 of 0, 2 (three of them) or 4 (just this one) reach 0.6, and as many reach -0.6."""
    found = rank_correlation([0, 1, 2, 3], [20.0, 10.0, 40.0, 30.0])
    assert found is not None
    assert found.rho == pytest.approx(0.6)
    assert found.p_value == pytest.approx(10 / 24)
    assert (found.n, found.method) == (4, "permutations")


def test_three_in_order_are_not_significant() -> None:
    found = rank_correlation([0, 1, 2], [0.1, 0.2, 0.3])
    assert found is not None and found.rho == pytest.approx(1) and found.p_value == pytest.approx(2 / 6)


@pytest.mark.parametrize("n", [5, 7, 8])
def test_few_values_against_scipys_exact_permutation_test(n: int) -> None:
    for seed in range(3 if n < 8 else 1):  # 40,320 orders take scipy five seconds
        draw = random.Random(seed)
        y = [float(draw.randint(0, 4)) for _ in range(n)]  # with ties
        found = rank_correlation(range(n), y)

        def rho(x: Sequence[float], y: Sequence[float] = y) -> float:
            return float(stats.spearmanr(x, y).statistic)

        exact = stats.permutation_test((list(range(n)),), rho, permutation_type="pairings", n_resamples=math.inf)
        assert found is not None and found.method == "permutations"
        assert found.rho == pytest.approx(exact.statistic)
        assert found.p_value == pytest.approx(exact.pvalue, rel=1e-9)


@pytest.mark.parametrize("n", [9, 30])
def test_many_values_against_scipys_spearmanr(n: int) -> None:
    draw = random.Random(n)
    y = [round(place + draw.gauss(0, n), 0) for place in range(n)]
    found, theirs = rank_correlation(range(n), y), stats.spearmanr(range(n), y)
    assert found is not None and found.method == "t"
    assert found.rho == pytest.approx(theirs.statistic)
    assert found.p_value == pytest.approx(theirs.pvalue)
    ordered = rank_correlation(range(n), range(n))
    assert ordered is not None and ordered.rho == pytest.approx(1)
    assert ordered.p_value == pytest.approx(0, abs=1e-12)


def test_no_order_where_all_are_equal_or_few() -> None:
    assert rank_correlation([0, 1, 2, 3], [1.0] * 4) is None
    assert rank_correlation([0, 1], [1.0, 2.0]) is None


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="expected as many y as x"):
        rank_correlation([0, 1, 2], [1.0])
    with pytest.raises(ValueError, match="finite"):
        rank_correlation([0, 1, 2], [1.0, math.nan, 2.0])
