"""Verdicts: what was decided about a claim, in which word, with the numbers behind it.

*Reproduced* and *contradicted* are for the published set-up and for claims in which chance has no part. A pocket run
says *same direction* or *opposite direction*: a small model cannot refute a claim about a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lora_lab.schema.claims import Claim, Form, Scale, is_deterministic
from lora_lab.study.estimate import Estimate

Decision = Literal["holds", "fails", "inconclusive", "not run", "not runnable"]

_WORDS: Mapping[bool, Mapping[Decision, str]] = {
    True: {"holds": "reproduced", "fails": "contradicted"},
    False: {"holds": "same direction", "fails": "opposite direction"},
}


def word_of(decision: Decision, claim: Claim, scale: Scale) -> str:
    """The word that a verdict may use for a decision. (That of a conjunction depends on its parts: see `judge`.)"""
    return word(decision, firm=scale == "published" or is_deterministic(claim))


def word(decision: Decision, *, firm: bool) -> str:
    """The word for a decision. firm: made on the published set-up, or without chance."""
    return _WORDS[firm].get(decision, decision)


@dataclass(frozen=True, slots=True)
class ArmScore:
    """One arm of a claim. value: mean over seeds and examples, or the measurement. standard_error: over examples and
    seeds; None where it has none. rate: the learning rate, where tuning picked it."""

    name: str
    value: float | None
    standard_error: float | None
    seeds: int
    rate: float | None
    run_ids: tuple[str, ...]
    missing: str | None


@dataclass(frozen=True, slots=True)
class Contrast:
    """One difference that a verdict rests on, for figures and tables. name: as `lora - qlora`. confidence: of the
    interval from interval_low to interval_high, in the unit of the verdict."""

    name: str
    estimate: Estimate
    confidence: float
    interval_low: float
    interval_high: float


def lies_inside(interval: tuple[float | None, float | None], low: float | None, high: float | None) -> bool:
    """Whether an interval, where there is one, lies wholly between low and high, None for an open end."""
    bottom, top = interval
    return bottom is not None and top is not None and (low is None or bottom > low) and (high is None or top < high)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of one claim in one form at one scale.

    word: as readers see it. sentence: the verdict in one sentence, with its numbers. metric, unit: what was compared, a
    metric or a measure of cost; a formula for exact claims. estimate: the difference, of interval claims (of best_of
    that to the closest rival, of ratios of the logarithm). value: of exact ones, and the ratio of ratios.
    interval_low, interval_high: the interval that was held against low and high, at `confidence`; None of exact ones.
    low, high: where the interval or value must lie for the claim to hold, None for an open end. contrasts: every single
    difference, of which best_of and monotone have several. reasons: why it is not decided. notes: what else to know.
    would_decide: what would, where that can be said.
    """

    claim: str
    form: Form | None
    scale: Scale
    decision: Decision
    word: str
    sentence: str
    metric: str | None
    unit: str | None
    estimate: Estimate | None
    confidence: float | None
    value: float | None
    interval_low: float | None
    interval_high: float | None
    low: float | None
    high: float | None
    arms: tuple[ArmScore, ...]
    contrasts: tuple[Contrast, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    would_decide: str | None

    def saying(self, sentence: str) -> Verdict:
        """The same, with its sentence."""
        return replace(self, sentence=sentence)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def verdict_from_json(values: Mapping[str, Any]) -> Verdict:
    """The verdict that `to_json` made the values of.

    Raises:
        KeyError, TypeError: a field is absent, or one is unknown.
    """
    fields = dict(values)
    fields["estimate"] = None if fields["estimate"] is None else Estimate(**fields["estimate"])
    fields["arms"] = tuple(ArmScore(**{**one, "run_ids": tuple(one["run_ids"])}) for one in fields["arms"])
    fields["contrasts"] = tuple(
        Contrast(**{**one, "estimate": Estimate(**one["estimate"])}) for one in fields["contrasts"]
    )
    for name in ("reasons", "notes"):
        fields[name] = tuple(fields[name])
    return Verdict(**fields)
