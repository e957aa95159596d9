"""Counts the verdicts of simulated studies: how often each rule says what, where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from lora_lab.study.crossed import contrast, crossed, trend
from lora_lab.study.decisions import (
    Ruling,
    best_of,
    confidence_of,
    equality,
    monotone,
    ratio_bounds,
    superiority,
)
from lora_lab.study.estimate import Estimate
from tests.calibration.worlds import BINARIES, CONTINUOUS, NOISES, Binary, Noise, differences, several_arms

# The smallest difference and the margin, in the unit of the metric.
CONTINUOUS_MARGIN = 0.15
BINARY_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Count:
    """Of so many simulated studies of one kind, how many were decided how.

    right: the decision that is true; None where the truth lies on the edge, so that none is false, though
    together they may come in 5 % of studies only (equality: 10 %).
    """

    outcome: str
    noise: str
    rule: str
    truth: str
    seeds: int
    examples: int
    studies: int
    right: str | None
    holds: float
    fails: float

    @property
    def false(self) -> float:
        """Share of studies with a false verdict; on the edge, with any."""
        if self.right is None:
            return self.holds + self.fails
        return self.fails if self.right == "holds" else self.holds

    @property
    def power(self) -> float | None:
        """Share of studies with the right verdict."""
        return None if self.right is None else (self.holds if self.right == "holds" else self.fails)

    @property
    def bound(self) -> float:
        """The most that `false` may be."""
        return 0.10 if self.right is None and self.rule.startswith("equality") else 0.05

    def to_json(self) -> dict[str, Any]:
        """All fields, and what follows from them."""
        return asdict(self) | {"false": self.false, "power": self.power}


Judged = tuple[str, str, str | None, Callable[[Estimate], Ruling]]


def _rules(margin: float) -> list[tuple[str, int, str | None, Callable[[Estimate], Ruling]]]:
    """Rule, truth in margins, right decision, ruling. The claims say higher; the mirror image would say the same."""
    wide, narrow = confidence_of("superiority"), confidence_of("equality")

    def by_margin(estimate: Estimate) -> Ruling:
        return superiority(estimate, "higher", margin, wide)

    def by_any(estimate: Estimate) -> Ruling:
        return superiority(estimate, "higher", 0.0, wide)

    def equal(estimate: Estimate) -> Ruling:
        return equality(estimate, margin, narrow)

    return [
        ("superiority by 0", 0, None, by_any),
        ("superiority by 0", 2, "holds", by_any),
        ("superiority by d", 0, "fails", by_margin),
        ("superiority by d", 1, None, by_margin),
        ("superiority by d", 2, "holds", by_margin),
        ("equality", 0, "holds", equal),
        ("equality", 1, None, equal),
        ("equality", 2, "fails", equal),
    ]


def _count(rulings: list[Ruling], **of_what: Any) -> Count:
    decided = [ruling.decision for ruling in rulings]
    shares = {word: decided.count(word) / len(decided) for word in ("holds", "fails")}
    return Count(studies=len(rulings), **of_what, **shares)


def _two_arms(
    estimates: dict[int, list[Estimate]], margin: float, outcome: str, noise: str, seeds: int, examples: int
) -> Iterator[Count]:
    """estimates: by the truth they were drawn at, in margins."""
    for rule, truth, right, ruling in _rules(margin):
        yield _count(
            [ruling(estimate) for estimate in estimates[truth]],
            outcome=outcome,
            noise=noise,
            rule=rule,
            truth=f"{truth} d",
            seeds=seeds,
            examples=examples,
            right=right,
        )


def continuous(
    rng: np.random.Generator, kind: str, noise: Noise, seeds: int, examples: int, studies: int
) -> Iterator[Count]:
    """Two arms; one draw serves every truth, which only moves it."""
    drawn = [crossed(*differences(rng, kind, noise, seeds, examples)) for _ in range(studies)]
    margin = CONTINUOUS_MARGIN
    moved = {truth: [replace(one, difference=one.difference + truth * margin) for one in drawn] for truth in (0, 1, 2)}
    return _two_arms(moved, margin, kind, noise.name, seeds, examples)


def binary(rng: np.random.Generator, world: Binary, seeds: int, examples: int, studies: int) -> Iterator[Count]:
    """Two arms that are right or wrong."""
    drawn = {
        truth: [contrast(world.arms(rng, truth * BINARY_MARGIN, seeds, examples), (1, -1)) for _ in range(studies)]
        for truth in (0, 1, 2)
    }
    return _two_arms(drawn, BINARY_MARGIN, "binary", world.name, seeds, examples)


# Rule, smallest difference and true means of four arms, all in margins, right decision. The named arm is the first.
BEST_OF = (
    ("best of 4, by 0", 0, (0, 0, 0, 0), None),
    ("best of 4, by 0", 0, (0, 0, -9, -9), None),
    ("best of 4, by d", 1, (0, 2, 0, 0), "fails"),
    ("best of 4, by d", 1, (0, 0, 0, 0), "holds"),
    ("best of 4, by 0", 0, (2, 0, 0, 0), "holds"),
)
MONOTONE = (
    ("monotone, by 0", 0, (0, 0, 0, 0), None),
    ("monotone, by d", 1, (0, 0, 0, 0), "fails"),
    ("monotone, by d", 1, (0, 1, 2, 3), "holds"),
    ("monotone, by d", 1, (4, 0, 3, 7), "fails"),
)


def best(rng: np.random.Generator, noise: Noise, seeds: int, examples: int, studies: int) -> Iterator[Count]:
    """One arm named as the best of four; and, as it must not be done but is, the one that came out best."""
    confidence, margin = confidence_of("best_of"), CONTINUOUS_MARGIN
    common = {"outcome": "four arms", "noise": noise.name, "seeds": seeds, "examples": examples}
    for rule, smallest, truths, right in BEST_OF:
        for after in (False, True) if right is None else (False,):
            rulings = []
            for _ in range(studies):
                arms = several_arms(rng, noise, tuple(margin * one for one in truths), seeds, examples)
                if after:
                    arms.sort(key=lambda scores: -float(scores.mean()))
                minus = [contrast((arms[0], other), (1, -1)) for other in arms[1:]]
                rulings.append(best_of(minus, "higher", smallest * margin, confidence))
            named = f"{rule}, named after" if after else rule
            yield _count(rulings, rule=named, truth=f"{truths} d", right=right, **common)


def ordered(rng: np.random.Generator, noise: Noise, seeds: int, examples: int, studies: int) -> Iterator[Count]:
    """Four arms along an axis; the last truth rises on the whole and is not monotone."""
    confidence, margin = confidence_of("monotone"), CONTINUOUS_MARGIN
    common = {"outcome": "four arms", "noise": noise.name, "seeds": seeds, "examples": examples}
    for rule, smallest, truths, right in MONOTONE:
        rulings = []
        for _ in range(studies):
            arms = several_arms(rng, noise, tuple(margin * one for one in truths), seeds, examples)
            steps = [contrast((after, before), (1, -1)) for before, after in pairwise(arms)]
            rise = contrast(arms, trend(len(arms)))
            rulings.append(monotone(rise, steps, "higher", smallest * margin, confidence))
        yield _count(rulings, rule=rule, truth=f"{truths} d", right=right, **common)


def ratios(rng: np.random.Generator, repeats: int, studies: int) -> Iterator[Count]:
    """Log ratios of times with a spread of 5 %; the claim says from 1.2 to 1.5."""
    confidence = confidence_of("ratio")
    for truth, right in ((1.0, "fails"), (1.2, None), (1.35, "holds"), (1.6, "fails")):
        drawn = np.log(truth) + 0.05 * rng.standard_normal((studies, repeats))
        rulings = [ratio_bounds(one, 1.2, 1.5, confidence) for one in drawn]
        common = {"outcome": "times", "noise": "5 %", "rule": "ratio", "truth": str(truth), "right": right}
        yield _count(rulings, seeds=repeats, examples=1, **common)


def everything(rng: np.random.Generator, seeds: tuple[int, ...], sizes: dict[int, int]) -> Iterator[Count]:
    """Every kind of study. sizes: how many studies for each number of examples."""
    for number in seeds:
        for examples, studies in sizes.items():
            for noise in NOISES:
                for kind in CONTINUOUS:
                    yield from continuous(rng, kind, noise, number, examples, studies)
            for world in BINARIES:
                yield from binary(rng, world, number, examples, studies)
        fewest, studies = next(iter(sizes.items()))
        for noise in NOISES[:3]:
            yield from best(rng, noise, number, fewest, studies // 6)
            yield from ordered(rng, noise, number, fewest, studies // 6)
        yield from ratios(rng, number, studies)
