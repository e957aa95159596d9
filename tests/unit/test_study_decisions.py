"""Rules of decision: what each says of intervals on either side of, and across, the edge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lora_lab.study.decisions import (
    best_of,
    confidence_of,
    equality,
    exact,
    monotone,
    ratio_bounds,
    superiority,
)
from lora_lab.study.estimate import Estimate

# Blood counts of animals under a control and two drugs (Dunnett 1955, table 1).
CONTROL = [7.40, 8.50, 7.20, 8.24, 9.84, 8.32]
DRUGS = [[9.76, 8.80, 7.68, 9.36], [12.80, 9.68, 12.16, 9.20, 10.55]]


def _estimate(difference: float, error: float = 1.0, degrees: float = 4.0) -> Estimate:
    return Estimate(difference, error, degrees, error**2, None, 5, 0)


# 2.776 is the two-sided 95 % quantile of Student's t with 4 degrees of freedom, 2.132 the 90 % one (any table).
@pytest.mark.parametrize(
    ("difference", "claimed", "smallest", "decision"),
    [
        (2.78, "higher", 0.0, "holds"),
        (2.77, "higher", 0.0, "inconclusive"),
        (-2.77, "higher", 0.0, "inconclusive"),
        (-2.78, "higher", 0.0, "fails"),
        (3.27, "higher", 0.5, "inconclusive"),
        (3.28, "higher", 0.5, "holds"),
        (-2.27, "higher", 0.5, "inconclusive"),
        (-2.28, "higher", 0.5, "fails"),
        (-3.28, "lower", 0.5, "holds"),
        (-3.27, "lower", 0.5, "inconclusive"),
        (2.27, "lower", 0.5, "inconclusive"),
        (2.28, "lower", 0.5, "fails"),
    ],
)
def test_superiority(difference: float, claimed: str, smallest: float, decision: str) -> None:
    ruling = superiority(_estimate(difference), claimed, smallest, 0.95)  # type: ignore[arg-type]
    assert ruling.decision == decision
    assert (ruling.low, ruling.high) == pytest.approx((difference - 2.7764, difference + 2.7764), abs=1e-4)
    assert (ruling.region_low, ruling.region_high) == ((smallest, None) if claimed == "higher" else (None, -smallest))


@pytest.mark.parametrize(
    ("difference", "decision"),
    [(0.86, "holds"), (-0.86, "holds"), (0.87, "inconclusive"), (5.13, "inconclusive"), (5.14, "fails"), (-6, "fails")],
)
def test_equality(difference: float, decision: str) -> None:
    assert equality(_estimate(difference), 3.0, 0.90).decision == decision


def test_equality_holds_where_both_one_sided_tests_reject() -> None:
    for difference in np.linspace(-3, 3, 61):
        ratios = (difference + 3) / 1.0, (3 - difference) / 1.0
        both_reject = all(stats.t.sf(ratio, 4) < 0.05 for ratio in ratios)
        assert (equality(_estimate(difference), 3.0, 0.90).decision == "holds") == both_reject


def test_no_interval_decides_with_the_truth_on_the_edge_of_nothing() -> None:
    still = _estimate(0.0, error=0.0)
    assert superiority(still, "higher", 0.0, 0.95).decision == "inconclusive"
    assert superiority(still, "higher", 0.1, 0.95).decision == "fails"
    assert equality(still, 0.1, 0.90).decision == "holds"


def test_monotone_is_the_rise_unless_a_step_goes_back() -> None:
    up, flat, down = _estimate(7.0), _estimate(0.0), _estimate(-7.0)
    assert monotone(up, [up, flat], "higher", 1.0, 0.95).decision == "holds"
    assert monotone(up, [up, down], "higher", 1.0, 0.95).decision == "fails"
    assert monotone(down, [down, flat], "higher", 1.0, 0.95).decision == "fails"
    assert monotone(flat, [flat, flat], "higher", 1.0, 0.95).decision == "inconclusive"
    assert monotone(down, [down, flat], "lower", 1.0, 0.95).decision == "holds"
    assert monotone(down, [down, up], "lower", 1.0, 0.95).decision == "fails"


def test_a_step_back_keeps_a_rise_from_holding_and_beyond_chance_it_fails() -> None:
    # With two steps each is at 99.5 %: quantile 5.598. A step may go back by the smallest difference, 1.
    up = _estimate(9.0)
    assert monotone(up, [up, _estimate(-0.99)], "higher", 1.0, 0.95).decision == "holds"
    assert monotone(up, [up, _estimate(-1.01)], "higher", 1.0, 0.95).decision == "inconclusive"
    assert monotone(up, [up, _estimate(-6.59)], "higher", 1.0, 0.95).decision == "inconclusive"
    assert monotone(up, [up, _estimate(-6.60)], "higher", 1.0, 0.95).decision == "fails"
    assert stats.t.isf(0.0025, 4) == pytest.approx(5.598, abs=1e-3)


def test_best_of_two_is_superiority_beyond_what_may_be_lost() -> None:
    for difference in np.linspace(-6, 6, 25):
        alone = best_of([_estimate(difference)], "higher", 1.0, 0.95)
        low, high = _estimate(difference).interval(0.95)
        assert (alone.low, alone.high) == (low, high)
        expected = "holds" if low > -1 else "fails" if high < -1 else "inconclusive"
        assert alone.decision == expected


def test_best_of_holds_by_its_closest_rival_and_fails_by_one_that_is_better() -> None:
    far, near, behind = _estimate(9.0), _estimate(2.9), _estimate(-4.0)
    assert best_of([far, near], "higher", 0.0, 0.95).decision == "holds"
    assert best_of([far, _estimate(2.7)], "higher", 0.0, 0.95).decision == "inconclusive"  # the maximum, not the best
    assert best_of([far, behind], "higher", 0.0, 0.95).decision == "fails"
    assert best_of([far, _estimate(-3.4)], "higher", 0.0, 0.95).decision == "inconclusive"  # 2.776 would do alone
    assert best_of([_estimate(-9.0), _estimate(-2.9)], "lower", 0.0, 0.95).decision == "holds"
    assert best_of([_estimate(-9.0), _estimate(4.0)], "lower", 0.0, 0.95).decision == "fails"
    with pytest.raises(ValueError, match="one arm"):
        best_of([], "higher", 0.0, 0.95)


def test_best_of_agrees_with_dunnett_where_variances_are_equal() -> None:
    groups = [CONTROL, *DRUGS]
    degrees = sum(map(len, groups)) - len(groups)
    pooled = sum(np.var(group, ddof=1) * (len(group) - 1) for group in groups) / degrees
    minus = [
        _estimate(
            float(np.mean(CONTROL) - np.mean(drug)),
            math.sqrt(pooled * (1 / len(CONTROL) + 1 / len(drug))),
            degrees,
        )
        for drug in DRUGS
    ]
    outside = stats.dunnett(*DRUGS, control=CONTROL, alternative="greater", rng=np.random.default_rng(0))
    dunnett_high = min(-outside.confidence_interval(0.975).low)
    ruling = best_of(minus, "higher", 0.0, 0.95)
    # Bonferroni's quantile is above Dunnett's, and here by little.
    assert dunnett_high < ruling.high < dunnett_high + 0.1
    # The lower end is that of a plain t interval of the strongest rival.
    assert ruling.low == pytest.approx(minus[1].interval(0.95)[0])
    assert ruling.decision == "fails"


def test_ratio_of_times() -> None:
    ratios = np.array([1.31, 1.36, 1.33, 1.40])
    ruling = ratio_bounds(np.log(ratios), 1.2, 1.5, 0.95)
    error = np.std(np.log(ratios), ddof=1) / math.sqrt(4 - 1)
    ends = stats.t.interval(0.95, 3, np.log(ratios).mean(), error)
    assert (ruling.low, ruling.high) == pytest.approx(tuple(np.exp(ends)))
    assert ruling.decision == "holds"
    assert ratio_bounds(np.log(ratios), 1.45, None, 0.95).decision == "fails"
    assert ratio_bounds(np.log(ratios), 1.35, 1.5, 0.95).decision == "inconclusive"
    assert ratio_bounds(-np.log(ratios), None, 1.0, 0.95).decision == "holds"


def test_fewer_than_three_repeats_decide_nothing() -> None:
    with pytest.raises(ValueError, match="fewer than 3 repeats decide nothing, got 2"):
        ratio_bounds([0.1, 0.1], 1.0, 2.0, 0.95)


@pytest.mark.parametrize(
    ("value", "low", "high", "decision"),
    [
        (1.5, 1.5, 2.0, "holds"),
        (2.0, 1.5, 2.0, "holds"),
        (2.1, 1.5, 2.0, "fails"),
        (1.4, 1.5, None, "fails"),
        (9.0, None, 9.0, "holds"),
    ],
)
def test_exact(value: float, low: float | None, high: float | None, decision: str) -> None:
    ruling = exact(value, low, high)
    assert (ruling.decision, ruling.low, ruling.high, ruling.confidence) == (decision, value, value, None)


def test_confidence_of_a_family() -> None:
    assert confidence_of("superiority") == 0.95
    assert confidence_of("equality") == 0.90
    assert confidence_of("best_of", 5) == pytest.approx(0.99)
    assert confidence_of("equality", 4) == pytest.approx(0.975)
    with pytest.raises(KeyError):
        confidence_of("exact")
