"""False verdicts of the crossed model's t interval by quadrature: normal noise, and so many examples that all but the
seeds' mean square is known. Nothing is drawn, so the worst case over all shares of the variance can be found."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

# The rule itself is under test here, on variances that no table of differences is needed for.
from lora_lab.study.crossed import _degrees_of_freedom

POINTS = 400
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


def _false(seeds: int, of_examples: float, of_rest: float, confidence: float) -> float:
    """How often the interval misses. Var(mean) is 1: the example part; of what is left, the part that is C / (S E).

    M_S / (S E) is that remainder times a chi-square over its degrees of freedom, and independent of the mean.
    """
    remainder, rest = 1 - of_examples, (1 - of_examples) * of_rest
    chances = (np.arange(POINTS) + 0.5) / POINTS
    squares = remainder * stats.chi2.ppf(chances, seeds - 1) / (seeds - 1)
    seed_parts = np.maximum(squares * seeds / (seeds - 1), rest)
    degrees = [_degrees_of_freedom(float(part), of_examples, rest, (seeds, 10**9)) for part in seed_parts]
    quantiles = special.stdtrit(degrees, 0.5 + confidence / 2)
    return float(np.mean(2 * special.ndtr(-quantiles * np.sqrt(seed_parts + of_examples))))


@pytest.mark.parametrize(("confidence", "most"), [(0.90, 0.10), (0.95, 0.046), (0.99, 0.01)])
@pytest.mark.parametrize("seeds", [3, 4, 5, 6, 10, 20])
def test_the_worst_share(seeds: int, confidence: float, most: float) -> None:
    worst = max(_false(seeds, example, rest, confidence) for example in SHARES for rest in SHARES)
    assert worst <= most


def test_where_seeds_are_all_it_is_students_t_with_the_factor_of_hc3() -> None:
    for seeds in (3, 5, 10):
        exact = 2 * stats.t.sf(stats.t.isf(0.025, seeds - 1) * np.sqrt(seeds / (seeds - 1)), seeds - 1)
        assert _false(seeds, 0.0, 0.0, 0.95) == pytest.approx(exact, abs=2e-4)
