"""The lab's statistics against published worked examples and against scipy.stats."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy import stats

from lora_lab.study.interval import mcnemar_p, ratio_interval, t_interval, t_quantile

# Extra hours of sleep by two drugs on ten patients (Cushny and Peebles 1905), the example of Student (1908).
SLEEP_1 = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SLEEP_2 = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def test_t_interval_of_students_sleep_data() -> None:
    """R's documentation prints for t.test(extra ~ group, paired): mean 1.58, interval 0.7001142 to 2.4598858."""
    interval = t_interval([b - a for a, b in zip(SLEEP_1, SLEEP_2, strict=True)])
    assert interval.mean == pytest.approx(1.58, abs=1e-12)
    assert interval.low == pytest.approx(0.7001142, abs=5e-8)
    assert interval.high == pytest.approx(2.4598858, abs=5e-8)
    assert interval.mean / interval.standard_error == pytest.approx(4.0621, abs=5e-5)


def test_t_interval_of_three_seeds_by_hand() -> None:
    """Values 2, 4, 6: mean 4, s = 2, se = 2 / sqrt 3, and the printed t table has 4.303 for two degrees of freedom."""
    interval = t_interval([2.0, 4.0, 6.0])
    assert interval.mean == 4.0
    assert interval.half_width == pytest.approx(4.302653 * 2 / math.sqrt(3), abs=1e-5)


@pytest.mark.parametrize(("degrees", "printed"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_t_quantiles_of_the_printed_table(degrees: int, printed: float) -> None:
    assert t_quantile(degrees) == pytest.approx(printed, abs=5e-4)
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


def test_t_interval_equals_scipy_on_random_samples() -> None:
    generator = random.Random(1)
    for count in (2, 3, 5, 40):
        values = [generator.gauss(3, 0.1) for _ in range(count)]
        expected = stats.t.interval(0.95, count - 1, statistics.fmean(values), stats.sem(values))
        interval = t_interval(values)
        assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_from_too_little_or_from_what_is_no_number(values: list[float]) -> None:
    with pytest.raises(ValueError, match="an interval needs"):
        t_interval(values)


def test_mcnemar_of_a_published_table() -> None:
    """Fagerland, Lydersen and Laake (2013): airway responsiveness of 21 children, discordant pairs 1 and 7; exact
    conditional p = 0.070, in closed form 2 (1 + 8) / 2^8."""
    assert mcnemar_p(1, 7) == pytest.approx(0.0703125, abs=1e-12)
    assert mcnemar_p(7, 1) == mcnemar_p(1, 7)


def test_mcnemar_equals_the_binomial_test() -> None:
    for only_a in range(12):
        for only_b in range(12):
            expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
            assert mcnemar_p(only_a, only_b) == pytest.approx(expected, abs=1e-12)


def test_ratio_interval_is_the_mean_when_all_denominators_are_equal() -> None:
    values = [0.3, 0.9, -0.2, 1.4]
    ratio, mean = ratio_interval([2 * value for value in values], [2] * 4), t_interval(values)
    assert ratio.mean == pytest.approx(mean.mean)
    assert ratio.half_width == pytest.approx(mean.half_width)


def test_ratio_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Rows of unequal length, difference 0.1 nats per token: about 95 of 100 intervals hold it."""
    generator = random.Random(7)
    covered = 0
    for _ in range(400):
        tokens = [generator.randint(5, 40) for _ in range(60)]
        sums = [0.1 * count + generator.gauss(0, 1) * math.sqrt(count) for count in tokens]
        interval = ratio_interval(sums, tokens)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98
