"""Verdicts: what was decided about a claim, in which word, with the numbers behind it.

*Reproduced* and *contradicted* are for the published set-up and for claims in which chance has no part. A pocket run
says *same direction* or *opposite direction*: a small model cannot refute a claim about a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_lab.schema.claims import Claim, Form, Scale, is_deterministic
from lora_lab.study.estimate import Estimate

Decision = Literal["holds", "fails", "inconclusive", "not run", "not runnable"]

_WORDS: Mapping[bool, Mapping[Decision, str]] = {
    True: {"holds": "reproduced", "fails": "contradicted"},
    False: {"holds": "same direction", "fails": "opposite direction"},
}


def word_of(decision: Decision, claim: Claim, scale: Scale) -> str:
    """The word that a verdict may use for a decision."""
    return _WORDS[scale == "published" or is_deterministic(claim)].get(decision, decision)


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
class Verdict:
    """What is said of one claim in one form at one scale.

    word: as readers see it (`word_of`). sentence: the verdict in one sentence, with its numbers. estimate: of
    interval claims, its `confidence` with it; value: of exact ones. low, high: what the estimate or value was held
    against, None for an open end. reasons: why it is not decided. would_decide: what would, where that can be said.
    """

    claim: str
    form: Form | None
    scale: Scale
    decision: Decision
    word: str
    sentence: str
    metric: str | None
    estimate: Estimate | None
    confidence: float | None
    value: float | None
    low: float | None
    high: float | None
    arms: tuple[ArmScore, ...]
    reasons: tuple[str, ...]
    would_decide: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)
