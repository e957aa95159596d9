"""A verdict in the making: the numbers and reasons, before its word and its sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.schema.claims import Form, Scale
from lora_lab.study.decisions import Ruling
from lora_lab.study.estimate import Estimate
from lora_lab.study.verdict import ArmScore, Contrast, Decision, Verdict, lies_inside


@dataclass(frozen=True, slots=True)
class Draft:
    """Fields as those of `Verdict`. run_ids: of all runs that it rests on."""

    metric: str | None = None
    decision: Decision = "inconclusive"
    unit: str | None = None
    estimate: Estimate | None = None
    confidence: float | None = None
    value: float | None = None
    interval_low: float | None = None
    interval_high: float | None = None
    low: float | None = None
    high: float | None = None
    arms: tuple[ArmScore, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    would_decide: str | None = None
    run_ids: tuple[str, ...] = ()

    @property
    def is_inside(self) -> bool:
        """Whether its interval lies where the claim needs it."""
        return lies_inside((self.interval_low, self.interval_high), self.low, self.high)

    def changed(self, **values: Any) -> Draft:
        """With other values of some fields."""
        return dataclasses.replace(self, **values)

    def undecided(self, decision: Decision, reasons: Sequence[str], would_decide: str | None) -> Draft:
        """Not decided, for these reasons; the numbers stay."""
        unique = tuple(dict.fromkeys(reasons))
        return self.changed(decision=decision, reasons=unique, would_decide=would_decide)

    def verdict(self, claim: str, form: Form | None, scale: Scale, *, word: str, sentence: str = "") -> Verdict:
        """The verdict, with its word; a sentence that is made from the verdict comes later (`Verdict.saying`)."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "run_ids"}
        return Verdict(claim=claim, form=form, scale=scale, word=word, sentence=sentence, **fields)

    def with_arms(self, arms: Sequence[ArmScore]) -> Draft:
        """With the scores of its arms."""
        return self.changed(arms=tuple(arms))

    def with_ruling(self, ruling: Ruling) -> Draft:
        """As a rule has decided it. An exact value has no interval."""
        ends = (None, None) if ruling.confidence is None else (ruling.low, ruling.high)
        return self.changed(
            decision=ruling.decision,
            confidence=ruling.confidence,
            interval_low=ends[0],
            interval_high=ends[1],
            low=ruling.region_low,
            high=ruling.region_high,
        )
