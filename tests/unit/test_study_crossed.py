"""Differences over crossed seeds and examples: against least squares, closed forms, and the ratio estimator."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_lab.study.crossed import contrast, crossed, mean_against_mean, trend
from lora_lab.study.interval import ratio_interval, t_interval

Floats = npt.NDArray[np.float64]

# Worked by hand: mean 5; seed means 4, 4, 7; example means 3, 5, 7, 5; squares of seeds 4 (1 + 1 + 4) = 24, of
# examples 3 (4 + 0 + 4 + 0) = 24; rest -1 1 1 -1, 1 -2 0 1, 0 1 -1 0, squares 4 + 6 + 2 = 12.
TABLE = [[1, 5, 7, 3], [3, 2, 6, 5], [5, 8, 8, 7]]


def _cells(shape: tuple[int, int], seed: int = 0, *, by_seed: float = 1.0, by_example: float = 1.0) -> Floats:
    rng = np.random.default_rng(seed)
    rows, columns = rng.standard_normal((shape[0], 1)), rng.standard_normal(shape[1])
    return 0.3 + by_seed * rows + by_example * columns + rng.standard_normal(shape)


def _mean_squares(values: Floats) -> tuple[float, float, float]:
    """Of seeds, examples and rest: by what the least-squares fit loses when the terms of one side are left out."""
    seeds, examples = values.shape
    rows = np.repeat(np.eye(seeds), examples, axis=0)
    columns = np.tile(np.eye(examples), (seeds, 1))

    def left(*terms: Floats) -> float:
        design = np.hstack([np.ones((values.size, 1)), *terms])
        fitted = design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
        return float(((values.ravel() - fitted) ** 2).sum())

    rest = left(rows, columns)
    of_seeds, of_examples = left(columns) - rest, left(rows) - rest
    return of_seeds / (seeds - 1), of_examples / (examples - 1), rest / ((seeds - 1) * (examples - 1))


def test_a_table_worked_by_hand() -> None:
    # M_S = 24 / 2 = 12, M_E = 24 / 3 = 8, M_R = 12 / 6 = 2, S E = 12.
    estimate = crossed(TABLE)
    assert estimate.difference == 5
    assert estimate.seed_part == pytest.approx(12 * 3 / 2 / 12)
    assert estimate.example_part == pytest.approx((8 - 2) / 12)
    assert estimate.standard_error == pytest.approx(math.sqrt(1.5 + 0.5))
    assert (estimate.degrees_of_freedom, estimate.seeds, estimate.examples) == (2, 3, 4)
    half = 4.302652729911275 * math.sqrt(1.5 + 0.5)
    assert estimate.interval(0.95) == pytest.approx((5 - half, 5 + half))


@pytest.mark.parametrize("shape", [(3, 7), (5, 40), (10, 20)])
def test_the_parts_are_those_of_a_least_squares_fit(shape: tuple[int, int]) -> None:
    values = _cells(shape)
    of_seeds, of_examples, rest = _mean_squares(values)
    assert of_seeds > rest and of_examples > rest
    estimate = crossed(values)
    assert estimate.difference == pytest.approx(values.mean())
    assert estimate.seed_part == pytest.approx(of_seeds * shape[0] / (shape[0] - 1) / values.size)
    assert estimate.example_part == pytest.approx((of_examples - rest) / values.size)


@pytest.mark.parametrize("seed", range(5))
def test_neither_part_is_negative_and_the_seed_part_never_below_the_rest(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((4, 12))
    values += 0.5 - values.mean(axis=1, keepdims=True)  # no seed differs
    values += 0.5 - values.mean(axis=0)  # no example differs
    rest = _mean_squares(values)[2]
    estimate = crossed(values)
    assert estimate.seed_part == pytest.approx(rest / values.size)
    assert estimate.example_part == 0


def test_the_seed_part_is_what_leaving_out_each_seed_changes() -> None:
    values = _cells((6, 30), by_seed=3.0)
    changes = [np.delete(values, row, axis=0).mean() - values.mean() for row in range(6)]
    assert crossed(values).seed_part == pytest.approx(sum(change**2 for change in changes))


def test_without_examples_it_is_student_over_seeds_with_the_factor_of_hc3() -> None:
    values = [0.31, 0.25, 0.44, 0.29, 0.38]
    estimate = crossed([[value] for value in values])
    assert estimate.standard_error == pytest.approx(t_interval(values).standard_error * math.sqrt(5 / 4))
    assert (estimate.degrees_of_freedom, estimate.example_part, estimate.examples) == (4, None, 0)


def test_without_seeds_it_is_student_over_examples() -> None:
    values = list(_cells((1, 50))[0])
    estimate, outside = crossed([values], deterministic=True), t_interval(values)
    assert estimate.interval(0.95) == pytest.approx((outside.low, outside.high))
    assert (estimate.seed_part, estimate.seeds, estimate.examples) == (None, 0, 50)


def test_a_ratio_of_one_row_is_the_ratio_estimator() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, 90, 40).astype(float)
    nats = tokens * rng.normal(0.2, 0.5, 40)
    estimate = crossed([nats], tokens, deterministic=True)
    outside = ratio_interval(list(nats), list(tokens))
    assert estimate.difference == pytest.approx(outside.mean)
    assert estimate.standard_error == pytest.approx(outside.standard_error)
    assert estimate.interval(0.95) == pytest.approx((outside.low, outside.high))


def test_a_ratio_with_equal_weights_is_the_mean() -> None:
    values = _cells((5, 30))
    plain, weighted = crossed(values), crossed(values * 7.0, np.full(30, 7.0))
    assert weighted.difference == pytest.approx(plain.difference)
    assert (weighted.seed_part, weighted.example_part) == pytest.approx((plain.seed_part, plain.example_part))


def test_the_seed_part_of_a_ratio_is_that_of_the_ratios_of_each_seed() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(3, 90, 25).astype(float)
    nats = tokens * _cells((5, 25), by_seed=3.0)
    ratios = nats.sum(axis=1) / tokens.sum()
    estimate = crossed(nats, tokens)
    assert estimate.difference == pytest.approx(ratios.mean())
    assert estimate.seed_part == pytest.approx(ratios.var(ddof=1) / 4)


def test_the_variance_is_on_average_what_its_docstring_says() -> None:
    rng = np.random.default_rng(5)
    a, b, c, seeds, examples, studies = 0.09, 0.5, 0.8, 5, 40, 3000
    cells = np.sqrt(c) * rng.standard_normal((studies, seeds, examples))
    cells += np.sqrt(a) * rng.standard_normal((studies, seeds, 1))
    cells += np.sqrt(b) * rng.standard_normal((studies, 1, examples))
    estimates = [crossed(one) for one in cells]
    by_seed = np.mean([one.seed_part for one in estimates])
    by_example = np.mean([one.example_part for one in estimates])
    assert by_seed == pytest.approx((a / seeds + c / (seeds * examples)) * seeds / (seeds - 1), rel=0.04)
    assert by_example == pytest.approx(b / examples, rel=0.04)
    spread = np.var([one.difference for one in estimates])
    assert spread == pytest.approx(a / seeds + b / examples + c / (seeds * examples), rel=0.1)


def test_degrees_of_freedom() -> None:
    few = crossed(_cells((4, 200), by_seed=0.0, by_example=9.0))
    assert few.degrees_of_freedom == 3  # below five seeds, no matter which part is large
    assert crossed(_cells((4, 3))).degrees_of_freedom == 2
    seeds_only = crossed(_cells((5, 200), by_seed=50.0, by_example=0.0))
    assert seeds_only.degrees_of_freedom == pytest.approx(4, rel=0.01)
    assert crossed(_cells((5, 200), by_seed=0.0, by_example=9.0)).degrees_of_freedom == 16
    both = crossed(_cells((5, 9)))
    assert both.seed_part is not None and both.example_part is not None
    rest = _mean_squares(_cells((5, 9)))[2] / 45
    share = (both.seed_part - rest / 3) / (both.seed_part + both.example_part)
    assert 0.3 < share < 0.95
    assert 1 / both.degrees_of_freedom == pytest.approx(share / 4 + (1 - share) / 8)


def test_the_interval_is_students() -> None:
    estimate = crossed(_cells((7, 30)))
    outside = stats.t.interval(0.9, estimate.degrees_of_freedom, estimate.difference, estimate.standard_error)
    assert estimate.interval(0.9) == pytest.approx(outside)


def test_scores_of_0_and_1_never_give_an_interval_without_width() -> None:
    none_differ = contrast([np.ones((3, 100)), np.ones((3, 100))], (1, -1))
    assert none_differ.difference == 0
    assert none_differ.standard_error == pytest.approx(2 / 100)
    assert crossed(np.zeros((5, 100))).standard_error == pytest.approx(2 / 100)
    assert crossed(np.full((5, 100), 0.5)).standard_error == 0


def test_no_right_answer_of_100_does_not_exclude_what_an_exact_interval_includes() -> None:
    # If none of 100 examples differ, the exact 95 % interval of the share that does ends at 3.6 % (Clopper-Pearson).
    exact_end = stats.binomtest(0, 100).proportion_ci(method="exact").high
    assert exact_end == pytest.approx(0.0362, abs=1e-4)
    for seeds in (3, 5, 10):
        assert crossed(np.zeros((seeds, 100))).interval(0.95)[1] > exact_end


def test_how_far_one_example_can_reach_follows_from_the_contrast() -> None:
    arms = [np.zeros((5, 50)) for _ in range(4)]
    assert contrast(arms, trend(4)).standard_error == pytest.approx(2 * 1.2 / 50)
    assert contrast(arms, mean_against_mean(2, 2)).standard_error == pytest.approx(2 * 1 / 50)
    halves = [arms[0] + 0.5, arms[1]]
    assert contrast(halves, (1, -1)).standard_error == 0  # not scores of 0 and 1


def test_what_arms_share_cancels() -> None:
    rng = np.random.default_rng(6)
    values = _cells((5, 60))
    shared = 100 * rng.standard_normal(60) + 100 * rng.standard_normal((5, 1))
    a, b = contrast([shared + values, shared], (1, -1)), crossed(values)
    assert a.interval(0.95) == pytest.approx(b.interval(0.95))


def test_an_arm_that_was_not_trained_has_one_row() -> None:
    trained, untrained = _cells((5, 30)), _cells((1, 30), 9)
    short = contrast([trained, untrained], (1, -1))
    assert short == contrast([trained, np.repeat(untrained, 5, axis=0)], (1, -1))
    assert contrast([untrained, 2 * untrained], (1, -1), deterministic=True).seeds == 0


def test_coefficients() -> None:
    assert mean_against_mean(2, 1) == (0.5, 0.5, -1.0)
    assert trend(2) == (-1, 1)
    assert trend(3) == (-1, 0, 1)
    assert trend(4) == pytest.approx((-0.9, -0.3, 0.3, 0.9))
    heights = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    assert np.dot(trend(5), heights) == pytest.approx(4 * np.polyfit(range(5), heights, 1)[0])


@given(
    st.integers(3, 7),
    st.integers(2, 9),
    st.integers(0, 1000),
    st.floats(-50, 50),
    st.floats(0.01, 100),
)
def test_order_does_not_matter_and_units_carry_over(
    seeds: int, examples: int, seed: int, shift: float, scale: float
) -> None:
    values = _cells((seeds, examples), seed)
    plain = crossed(values)
    rng = np.random.default_rng(seed)
    mixed = crossed(values[rng.permutation(seeds)][:, rng.permutation(examples)])
    assert mixed.interval(0.95) == pytest.approx(plain.interval(0.95))
    moved = crossed(shift - scale * values)
    assert moved.difference == pytest.approx(shift - scale * plain.difference, abs=1e-9)
    assert moved.standard_error == pytest.approx(scale * plain.standard_error)
    assert moved.degrees_of_freedom == pytest.approx(plain.degrees_of_freedom)


@pytest.mark.parametrize(
    ("values", "weights", "deterministic", "what"),
    [
        ([[1.0, 2.0], [2.0, 3.0]], None, False, "fewer than 3 seeds decide nothing, got 2"),
        ([[1.0, 2.0]], None, False, "fewer than 3 seeds"),
        ([1.0, 2.0, 3.0], None, False, r"shape \(seeds, examples\), got \(3,\)"),
        (np.zeros((3, 0)), None, False, "shape"),
        ([[1.0], [math.nan], [2.0]], None, False, "finite"),
        ([[1.0]], None, True, "at least 2 examples"),
        (np.zeros((3, 4)), None, True, "one row"),
        (np.zeros((3, 2)), [1.0], False, r"weights need the shape \(2,\)"),
        (np.zeros((3, 2)), [1.0, 0.0], False, "positive"),
        (np.zeros((3, 2)), [1.0, math.inf], False, "positive and finite"),
    ],
)
def test_what_cannot_be_judged(
    values: npt.ArrayLike, weights: npt.ArrayLike | None, deterministic: bool, what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        crossed(values, weights, deterministic=deterministic)


def test_arms_must_fit() -> None:
    with pytest.raises(ValueError, match="2 arms and 3 coefficients"):
        contrast([np.zeros((3, 2)), np.zeros((3, 2))], (1, -1, 0))
    with pytest.raises(ValueError, match="equal shapes"):
        contrast([np.zeros((3, 2)), np.zeros((4, 2))], (1, -1))
    with pytest.raises(ValueError, match="equal shapes"):
        contrast([np.zeros((3, 2)), np.zeros((1, 1))], (1, -1))
