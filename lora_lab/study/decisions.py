"""Rules of decision: from an interval, or an exact value, to holds, fails or inconclusive.

All rules are one rule: a claim names a region that the difference must lie in. An interval inside the region: the claim
holds; outside of it: the claim fails; across its edge: inconclusive. What differs is the region and the interval.

| rule | of | region | interval |
|---|---|---|---|
| superiority, higher | arm - against | above d | two-sided 95 % |
| superiority, lower | arm - against | below -d | two-sided 95 % |
| equality | arm - against | between -m and m | two-sided 90 %: two one-sided tests (Schuirmann 1987) |
| monotone | rise from first to last arm on the straight line | as superiority | as superiority; and no step back |
| best of k + 1 | best - best of the others | above -d (lower metrics: below d) | Hsu (1984), see `best_of` |
| ratio | cost of arm / cost of against | from low to high | two-sided 95 % of log ratios |
| exact | a value | from low to high, ends included | none |

d: smallest difference of interest, m: equivalence margin, both in the metric's unit. Of a family of n claims each is
judged with its error divided by n (Bonferroni): see `confidence_of`. A conjunction needs no correction: it holds only
if every part does (intersection-union, Berger 1982).

False verdicts: with the truth inside the region, *fails* is wrong, in at most 2.5 % of studies (equality 5 %); with the
truth outside, *holds* is, as often. On the edge itself neither is wrong; both together come in at most 5 % (10 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lora_lab.study.crossed import crossed
from lora_lab.study.estimate import Estimate

Claimed = Literal["higher", "lower"]
Decided = Literal["holds", "fails", "inconclusive"]
FEWEST_REPEATS = 3

_ERROR = {"superiority": 0.05, "monotone": 0.05, "best_of": 0.05, "ratio": 0.05, "equality": 0.10}
# Of the error of a monotone claim, what is for steps that go back.
_STEPS_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Ruling:
    """A decision with what it was taken from. low, high: the interval, in the unit of the metric (of ratios, as ratio),
    always arm minus against. region_low, region_high: where it must lie for the claim to hold; None is an open end.
    confidence: of the interval; None of an exact value."""

    decision: Decided
    low: float
    high: float
    region_low: float | None
    region_high: float | None
    confidence: float | None


def confidence_of(rule: str, members: int = 1) -> float:
    """The confidence of a rule's interval, for each of `members` claims that are judged as one family.

    Raises:
        KeyError: a rule that has no interval.
    """
    return 1 - _ERROR[rule] / members


def superiority(estimate: Estimate, claimed: Claimed, smallest: float, confidence: float) -> Ruling:
    """Higher (or lower) by more than `smallest` >= 0; estimate: of arm minus against."""
    low, high = estimate.interval(confidence)
    return _ruling(low, high, *_beyond(claimed, smallest), confidence)


def equality(estimate: Estimate, margin: float, confidence: float) -> Ruling:
    """Equal within `margin` > 0. confidence: 0.90 tests each side at 5 %."""
    low, high = estimate.interval(confidence)
    return _ruling(low, high, -margin, margin, confidence)


def monotone(rise: Estimate, steps: Sequence[Estimate], claimed: Claimed, smallest: float, confidence: float) -> Ruling:
    """The metric gets higher (or lower) along the arms, by more than `smallest` from the first to the last.

    rise: the contrast `crossed.trend`. steps: each arm minus the one before it. A rise on the whole is no evidence of
    order: the claim does not hold (inconclusive) if some step of the means goes back by more than `smallest`, and it
    fails if that is beyond chance. For this the steps share a fifth of the error (99 % where confidence is 95 %,
    Bonferroni), so that at a truth on the edge it adds to false verdicts by half a percent at most.
    """
    ruling = superiority(rise, claimed, smallest, confidence)
    backward: Claimed = "lower" if claimed == "higher" else "higher"
    sign = 1 if claimed == "higher" else -1
    each = step_confidence(confidence, len(steps))
    if any(superiority(step, backward, smallest, each).decision == "holds" for step in steps):
        return replace(ruling, decision="fails")
    if ruling.decision == "holds" and any(sign * step.difference < -smallest for step in steps):
        return replace(ruling, decision="inconclusive")
    return ruling


def step_confidence(confidence: float, steps: int) -> float:
    """The confidence of the interval of each of the steps of a monotone claim."""
    return 1 - (1 - confidence) * _STEPS_SHARE / max(steps, 1)


def best_of(estimates: Sequence[Estimate], claimed: Claimed, smallest: float, confidence: float) -> Ruling:
    """No other arm is better than the one named in advance by more than `smallest` >= 0.

    estimates: the named arm minus each other arm. Hsu's (1984) comparison with the best: an interval for the named arm
    minus the best of the others, from the smallest of the lower ends to the smallest of the upper ends (where higher is
    better). The upper ends are simultaneous: with k others each has the error (1 - confidence) / (2 k), Bonferroni in
    place of Dunnett's quantile, which asks for equal variances. The lower end needs no correction, as one arm is named
    before the data: the smallest lower end is too high only if that of the truly best other arm is (Berger 1982). With
    one other arm this is `superiority` with -smallest. The interval is not cut at zero, as Hsu's is.

    Raises:
        ValueError: no estimates.
    """
    if not estimates:
        raise ValueError("the best of one arm is no comparison")
    each = 1 - (1 - confidence) / len(estimates)
    plain, corrected = [one.interval(confidence) for one in estimates], [one.interval(each) for one in estimates]
    if claimed == "higher":
        return _ruling(min(x for x, _ in plain), min(x for _, x in corrected), -smallest, None, confidence)
    return _ruling(max(x for x, _ in corrected), max(x for _, x in plain), None, smallest, confidence)


def ratio_bounds(log_ratios: Sequence[float], low: float | None, high: float | None, confidence: float) -> Ruling:
    """A ratio of costs between `low` and `high`, from the natural logarithms of the ratios of paired repeats.

    The interval is Student's t of the mean logarithm, so of the geometric mean of the ratios.

    Raises:
        ValueError: fewer than 3 repeats, or a logarithm that is not finite.
    """
    if len(log_ratios) < FEWEST_REPEATS:
        raise ValueError(f"fewer than {FEWEST_REPEATS} repeats decide nothing, got {len(log_ratios)}")
    ends = crossed([[value] for value in log_ratios]).interval(confidence)
    return _ruling(math.exp(ends[0]), math.exp(ends[1]), low, high, confidence)


def exact(value: float, low: float | None, high: float | None) -> Ruling:
    """A value without chance in it: it lies between `low` and `high`, ends included, or it does not."""
    inside = (low is None or value >= low) and (high is None or value <= high)
    return Ruling("holds" if inside else "fails", value, value, low, high, None)


def _beyond(claimed: Claimed, smallest: float) -> tuple[float | None, float | None]:
    return (smallest, None) if claimed == "higher" else (None, -smallest)


def _ruling(low: float, high: float, region_low: float | None, region_high: float | None, confidence: float) -> Ruling:
    bottom = -math.inf if region_low is None else region_low
    top = math.inf if region_high is None else region_high
    decision: Decided = "inconclusive"
    if low > bottom and high < top:
        decision = "holds"
    elif high < bottom or low > top:
        decision = "fails"
    return Ruling(decision, low, high, region_low, region_high, confidence)
