"""Seeds crossed with examples: the standard error of a difference when all seeds are scored on the same examples.

Model, of the difference between two arms (or any contrast of arms) at seed s and example e, paired by both:

    d_se = mu + a_s + b_e + c_se,    s = 1..S, e = 1..E

a (variance A: seeds), b (variance B: examples) and c (variance C: the rest, one value a cell) are independent with
mean 0; both seeds and examples are samples, from all seeds and from all examples that might have been drawn. This is
the two-way crossed random model without replication (Cornfield and Tukey 1956; Searle, Casella and McCulloch, Variance
Components, 1992). The mean of all cells estimates mu, with

    Var(mean) = A / S + B / E + C / (S E)

The mean squares and what they are on average:

    M_S = E sum_s (mean_s - mean)^2 / (S - 1)                              C + E A
    M_E = S sum_e (mean_e - mean)^2 / (E - 1)                              C + S B
    M_R = sum_se (d_se - mean_s - mean_e + mean)^2 / ((S - 1) (E - 1))     C

The variance used is the sum of two parts, neither of which can be negative:

    seed part    = max(M_S S / (S - 1), M_R) / (S E)     on average at least (A / S + C / (S E)) S / (S - 1)
    example part = max(M_E - M_R, 0) / (S E)             on average at least B / E

so that its expectation is above Var(mean): by cutting at zero, and by the factor S / (S - 1), that is HC3 (Davidson
and MacKinnon 1993): M_S S / (S - 1) / (S E) is the sum of the squared changes of the mean as each seed is left out.
With the bare M_S, a t interval is wrong in exactly 5 % of studies if seeds are normal and dominate, and in more if they
are skewed. (M_S + M_E - M_R, uncut, is the two-way clustered variance of Cameron, Gelbach and Miller 2011.)

Degrees of freedom:

    S < 5:   min(S - 1, E - 1)
    S >= 5:  1 / df = f / (S - 1) + (1 - f) / (E - 1),  but df at most 16,
             f = (seed part - M_R / (3 S E)) / (seed part + example part)

The first is conservative: Student's ratio over a mixture of chi-squares has no heavier tails than t with the smallest
of their degrees of freedom (Hajek 1962; Mickey and Brown 1966). The second weighs the two as Cochran and Cox (1957)
weigh quantiles in the Behrens-Fisher problem. Satterthwaite (1946) has f^2 in place of f, and is too narrow here: where
M_S is small by chance, so is the variance, and the degrees of freedom are large just then. Two things are no theory but
set by calibration. The ceiling: without it, studies of 100 examples in which examples dominate, skewed or of unequal
weight, gave up to 5.9 % of false verdicts, and with it 4.7 %. The third of M_R that f leaves out: M_R is known from
(S - 1)(E - 1) values. To leave out none of it widens intervals by 10 % at 5 seeds where c dominates; to leave out all
gives up to 5.4 % of false verdicts at 95 % and 1.9 % at 99 %; a third gives 4.5 % and 0.9 % (normal, E infinite, by
quadrature, worst over all shares). All is held to simulated studies (tests/calibration).

Why no bootstrap: to draw seeds, and then examples anew within each drawn seed, treats examples as nested in seeds. It
averages the example part over S draws, as if every seed had been scored on examples of its own: B / (S E) for B / E.
And S seeds drawn with replacement have (S - 1) / S of their variance, and quantiles that know nothing of Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lora_lab.schema.claims import FEWEST_SEEDS
from lora_lab.study.estimate import Estimate

Floats = npt.NDArray[np.float64]

# From how many seeds on the degrees of freedom may be more than S - 1.
_SEEDS_WEIGHED = 5
# The most degrees of freedom that seeds and examples together may have.
_MOST_DEGREES = 16.0
# Pseudo-examples that differ, of binary scores: half to either side.
_PSEUDO_EXAMPLES = 4


def crossed(
    differences: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    deterministic: bool = False,
    reach: float | None = None,
) -> Estimate:
    """The mean difference with its standard error over seeds and examples.

    differences: shape (seeds, examples); of a metric without examples, (seeds, 1), and then there is no example part.
    weights: shape (examples,), for metrics that are a sum over a sum, such as loss per token. `differences` are then
    those of the numerators (nats of a row), weights the denominators (its loss tokens), and the difference is sum over
    sum, linearised around itself (Cochran 1977, section 6.4): u_se = (x_se - R w_e) / mean(w) takes the place of d_se.
    deterministic: chance has no part but in the examples (no arm was trained); one row, shape (1, examples).
    reach: the largest difference that one example can show, where scores are 0 or 1. Adds 4 reach^2 / E^2 to the
    example part: four examples more that differ, half to either side, in the variance only, so that no interval has
    width 0 because few examples differ. Four as Agresti and Coull (1998); the one that Agresti and Min (2005) add to
    matched pairs is too few where all that differ go one way: none of 100 differ in 11 % of studies with a truth of
    2.2 points, and the upper end would be 2.1. None: 1 if every difference is -1, 0 or 1 and there are no weights, else
    nothing is added.

    Raises:
        ValueError: another shape, fewer than 3 seeds, fewer than 2 examples of a deterministic difference, a value
            that is not finite, a weight that is not positive.
    """
    values = _checked(differences, deterministic=deterministic)
    if reach is None and weights is None and bool(np.isin(values, (-1.0, 0.0, 1.0)).all()):
        reach = 1.0
    ratio, effects = _linearised(values, weights)
    seeds, examples = values.shape
    seed_part, example_part, rest_part = _parts(effects)
    if example_part is not None and reach is not None:
        example_part += _PSEUDO_EXAMPLES * (reach / examples) ** 2
    return Estimate(
        difference=ratio,
        standard_error=math.sqrt((seed_part or 0.0) + (example_part or 0.0)),
        degrees_of_freedom=_degrees_of_freedom(seed_part, example_part, rest_part, (seeds, examples)),
        seed_part=seed_part,
        example_part=example_part,
        seeds=0 if seed_part is None else seeds,
        examples=0 if example_part is None else examples,
    )


def contrast(
    scores: Sequence[npt.ArrayLike],
    coefficients: Sequence[float],
    weights: npt.ArrayLike | None = None,
    *,
    deterministic: bool = False,
) -> Estimate:
    """The sum of coefficient times score over arms, paired by seed and example (see `crossed`).

    scores: one array (seeds, examples) per arm, rows in the order of the same seeds. An arm that was not trained may
    have one row, which then stands for every seed. coefficients sum to 0 for a comparison: (1, -1) is first minus
    second, `mean_against_mean` and `trend` give others. Scores that are all 0 or 1 are told from the values.

    Raises:
        ValueError: as `crossed`; arms with different shapes; as many coefficients as arms are needed.
    """
    if len(scores) != len(coefficients) or not scores:
        raise ValueError(f"{len(scores)} arms and {len(coefficients)} coefficients")
    arms = [np.asarray(one, dtype=np.float64) for one in scores]
    shapes = {one.shape for one in arms if one.shape[:1] != (1,)} or {arms[0].shape}
    if len(shapes) > 1 or len({one.shape[-1:] for one in arms}) > 1:
        raise ValueError(f"arms need equal shapes (seeds, examples), got {', '.join(str(one.shape) for one in arms)}")
    total = np.zeros(shapes.pop())
    for one, coefficient in zip(arms, coefficients, strict=True):
        total = total + coefficient * one
    reach = None
    if weights is None and all(bool(np.isin(one, (0.0, 1.0)).all()) for one in arms):
        reach = max(sum(max(sign * value, 0.0) for value in coefficients) for sign in (1, -1))
    return crossed(total, weights, deterministic=deterministic, reach=reach)


def mean_against_mean(arms: int, against: int) -> tuple[float, ...]:
    """Coefficients of: mean of the first `arms` arms minus mean of the next `against`."""
    return (1 / arms,) * arms + (-1 / against,) * against


def trend(arms: int) -> tuple[float, ...]:
    """Coefficients of the rise from the first arm to the last on the least-squares line through all, equally spaced.

    (-1, 1) for two arms, (-1, 0, 1) for three, (-0.9, -0.3, 0.3, 0.9) for four.
    """
    centred = [index - (arms - 1) / 2 for index in range(arms)]
    squares = math.fsum(value * value for value in centred)
    return tuple((arms - 1) * value / squares for value in centred)


def _checked(differences: npt.ArrayLike, *, deterministic: bool) -> Floats:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"differences need the shape (seeds, examples), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("differences need to be finite")
    seeds, examples = values.shape
    if deterministic and (seeds != 1 or examples < 2):
        raise ValueError(f"a deterministic difference needs one row of at least 2 examples, got {values.shape}")
    if not deterministic and seeds < FEWEST_SEEDS:
        raise ValueError(f"fewer than {FEWEST_SEEDS} seeds decide nothing, got {seeds}")
    return values


def _linearised(values: Floats, weights: npt.ArrayLike | None) -> tuple[float, Floats]:
    """The difference, and deviations whose crossed variance is its variance."""
    if weights is None:
        mean = float(values.mean())
        return mean, values - mean
    sizes = np.asarray(weights, dtype=np.float64)
    if sizes.shape != values.shape[1:]:
        raise ValueError(f"weights need the shape ({values.shape[1]},), got {sizes.shape}")
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError("weights need to be positive and finite")
    ratio = float(values.sum() / (values.shape[0] * sizes.sum()))
    return ratio, (values - ratio * sizes) / sizes.mean()


def _parts(effects: Floats) -> tuple[float | None, float | None, float]:
    """Seed part and example part of the variance of the mean, None where a side has one row only; and M_R / (S E)."""
    seeds, examples = effects.shape
    by_seed = effects.mean(axis=1)
    by_example = effects.mean(axis=0)
    mean = float(effects.mean())
    of_examples = float(((by_example - mean) ** 2).sum()) / (examples - 1) if examples > 1 else 0.0
    if seeds == 1:
        return None, of_examples / examples, 0.0
    jackknife = float(((by_seed - mean) ** 2).sum()) / (seeds - 1) ** 2
    if examples == 1:
        return jackknife, None, 0.0
    squares = float(((effects - by_seed[:, None] - by_example + mean) ** 2).sum())
    rest = squares / ((seeds - 1) * (examples - 1)) / (seeds * examples)
    return max(jackknife, rest), max(of_examples / examples - rest, 0.0), rest


def _degrees_of_freedom(
    seed_part: float | None, example_part: float | None, rest_part: float, shape: tuple[int, int]
) -> float:
    seeds, examples = shape
    if seed_part is None:
        return examples - 1.0
    if example_part is None:
        return seeds - 1.0
    if seeds < _SEEDS_WEIGHED or seed_part + example_part == 0:
        return min(seeds - 1.0, examples - 1.0)
    share = (seed_part - rest_part / 3) / (seed_part + example_part)
    return min(1 / (share / (seeds - 1) + (1 - share) / (examples - 1)), _MOST_DEGREES)
