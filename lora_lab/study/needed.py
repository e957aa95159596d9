"""How much more it would take to decide a claim whose interval crosses the edge: seeds, or examples, at the present
difference and spread. A guess for planning: the next difference will be another one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lora_lab.study.estimate import Estimate

_MOST_SEEDS = 1000
_MOST_TIMES = 1000
# As many degrees of freedom as `crossed` ever gives where examples have a part.
_MOST_DEGREES = 16.0


def seeds_needed(estimate: Estimate, confidence: float, gap: float) -> int | None:
    """The fewest seeds with which the half width is below `gap`; None where 1000 do not do it."""
    if estimate.seed_part is None:
        return None
    for seeds in range(max(estimate.seeds, 2), _MOST_SEEDS + 1):
        part = estimate.seed_part * estimate.seeds / seeds
        degrees = seeds - 1.0 if estimate.example_part is None else min(seeds - 1.0, _MOST_DEGREES)
        degrees = max(degrees, min(estimate.degrees_of_freedom, _MOST_DEGREES))
        if _half_width(estimate, part, estimate.example_part or 0.0, degrees, confidence) < gap:
            return seeds
    return None


def examples_needed(estimate: Estimate, confidence: float, gap: float) -> int | None:
    """The fewest examples, in steps of a tenth, with which the half width is below `gap`; None where a thousand times
    as many do not do it."""
    if estimate.example_part is None:
        return None
    times = 1.0
    while times <= _MOST_TIMES:
        part = estimate.example_part / times
        if _half_width(estimate, estimate.seed_part or 0.0, part, estimate.degrees_of_freedom, confidence) < gap:
            return math.ceil(estimate.examples * times)
        times *= 1.1
    return None


def _half_width(estimate: Estimate, seed_part: float, example_part: float, degrees: float, confidence: float) -> float:
    error = math.sqrt(seed_part + example_part)
    return dataclasses.replace(estimate, standard_error=error, degrees_of_freedom=degrees).half_width(confidence)


def what_decides(estimate: Estimate, confidence: float, edges: Sequence[float], *, unit: str) -> str:
    """In words. edges: those of the region that the claim names. unit: what the first axis is, `seed` or `repeat`."""
    gap = min(abs(estimate.difference - edge) for edge in edges)
    seeds = seeds_needed(estimate, confidence, gap)
    examples = examples_needed(estimate, confidence, gap)
    ways = []
    if seeds is not None:
        fresh = " (fresh ones, judged by themselves)" if unit == "seed" else ""
        ways.append(f"about {seeds} {unit}s in place of {estimate.seeds}{fresh}")
    if examples is not None:
        ways.append(f"about {examples} examples in place of {estimate.examples}")
    if ways:
        return f"at the present difference and spread: {' or '.join(ways)}"
    if estimate.seed_part is not None and estimate.example_part is not None:
        return f"more {unit}s and more examples together; neither alone, as the difference is this close to the edge"
    return "the difference is too close to the edge for any number within reach"
