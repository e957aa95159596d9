"""Claims: published statements, and by which rule, on which numbers, each is decided; all of it fixed before a run.

Every claim has an id, the statement, and `rule`. What the rules decide, from which interval, stands in
`lora_lab.study.decisions`; which words a verdict may use, in `lora_lab.study.verdict`. Arms are named in the study
(`arms:`), once per scale.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, model_validator

from lora_lab.schema.formula import Formula, formula_of
from lora_lab.schema.section import Names, NonNegative, Number, Positive, Section, Text, as_tuple

Scale = Literal["pocket", "published"]
# as_published: at the rate that the study fixes, as the source did. tuned: each arm at the rate that tuning found.
Form = Literal["as_published", "tuned"]

# Fewer seeds decide nothing (see `lora_lab.study.crossed`).
FEWEST_SEEDS = 3

_ID = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _identifier(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError(f'expected letters, digits and _, not starting with a digit, got "{text[:80]}"')
    return text


def _formula(text: str) -> str:
    formula_of(text)
    return text


Identifier = Annotated[str, AfterValidator(_identifier)]
Scales = Annotated[tuple[Scale, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Forms = Annotated[tuple[Form, ...], BeforeValidator(as_tuple), Field(min_length=1)]


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else as_tuple(value)


# One arm, or several whose mean is meant.
Arms = Annotated[tuple[Text, ...], BeforeValidator(_one_or_more), Field(min_length=1)]


class Published(Section):
    """A number of the source. id: its name in formulas. provenance: where exactly it stands."""

    id: Identifier
    value: Number
    unit: str = ""
    what: Text
    provenance: Text


class _Claim(Section):
    """What every claim has.

    finding: the id of the published claim that this is. published: the source's numbers. differences: how the test
    departs from the source, beyond what the study's `source.notes` says. scales: where the claim is judged; claims
    without arms of runs are judged at either. family: claims of one family are judged together, each at 5 % divided
    by their number (Bonferroni).
    """

    id: Identifier
    statement: Text
    finding: str | None = None
    published: Annotated[tuple[Published, ...], BeforeValidator(as_tuple)] = ()
    differences: str | None = None
    scales: Scales = ("pocket", "published")
    family: Identifier | None = None


class _Scored(_Claim):
    """A claim about a metric that single examples have. seeds: how many are needed; None is all of the study."""

    metric: Text
    forms: Forms = ("as_published",)
    seeds: Annotated[int, Field(ge=FEWEST_SEEDS)] | None = None


class _TwoSides(_Scored):
    """arm and against: names of arms; of several, the mean."""

    arm: Arms
    against: Arms

    @model_validator(mode="after")
    def _two_arms(self) -> _TwoSides:
        if set(self.arm) & set(self.against):
            raise ValueError(f"arm and against share {', '.join(sorted(set(self.arm) & set(self.against)))}")
        return self


class Superiority(_TwoSides):
    """`arm` is higher (or lower) than `against` by more than smallest_difference, in the metric's unit."""

    rule: Literal["superiority"]
    claimed: Literal["higher", "lower"]
    smallest_difference: NonNegative


class Equality(_TwoSides):
    """`arm` and `against` differ by less than margin, in the metric's unit."""

    rule: Literal["equality"]
    margin: Positive


class Monotone(_Scored):
    """Along `arms`, in their order, the metric gets higher (or lower): by more than smallest_difference from the first
    to the last, on the straight line through all."""

    rule: Literal["monotone"]
    arms: Annotated[tuple[Text, ...], BeforeValidator(as_tuple), Field(min_length=3)]
    claimed: Literal["higher", "lower"]
    smallest_difference: NonNegative


class BestOf(_Scored):
    """`best` has the highest (or lowest) metric among `arms`: no other is better by more than smallest_difference."""

    rule: Literal["best_of"]
    arms: Annotated[tuple[Text, ...], BeforeValidator(as_tuple), Field(min_length=2)]
    best: Text
    claimed: Literal["higher", "lower"]
    smallest_difference: NonNegative

    @model_validator(mode="after")
    def _best_is_an_arm(self) -> BestOf:
        if self.best not in self.arms:
            raise ValueError(f'best: "{self.best}" is none of the arms {", ".join(self.arms)}')
        return self


class _Bounded(_Claim):
    """low and high: what the value must lie between for the claim to hold; None leaves an end open."""

    low: Number | None = None
    high: Number | None = None

    @model_validator(mode="after")
    def _has_bounds(self) -> _Bounded:
        if self.low is None and self.high is None:
            raise ValueError("needs low, high, or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Ratio(_Bounded):
    """A cost of `arm` divided by that of `against`: seconds, bytes or counts of the runs."""

    rule: Literal["ratio"]
    measure: Text
    arm: Text
    against: Text
    forms: Forms = ("as_published",)


class Exact(_Bounded):
    """A formula (`lora_lab.schema.formula`) over published numbers and over quantities that have no chance in them."""

    rule: Literal["exact"]
    value: Annotated[Text, AfterValidator(_formula)]

    @property
    def formula(self) -> Formula:
        """The formula, read."""
        return formula_of(self.value)


class Conjunction(_Claim):
    """All parts hold (ids of claims of the study); no correction, since one part that fails decides."""

    rule: Literal["conjunction"]
    parts: Annotated[Names, Field(min_length=2)]


class NotRunnable(_Claim):
    """A claim that cannot be scored or placed here; the reason says why."""

    rule: Literal["not_runnable"]
    reason: Text


Claim = Annotated[
    Superiority | Equality | Monotone | BestOf | Ratio | Exact | Conjunction | NotRunnable, Discriminator("rule")
]


def arm_names(claim: Claim) -> tuple[str, ...]:
    """The arms that a claim compares, each once."""
    if isinstance(claim, _TwoSides):
        named: tuple[str, ...] = (*claim.arm, *claim.against)
    elif isinstance(claim, (Monotone, BestOf)):
        named = claim.arms
    elif isinstance(claim, Ratio):
        named = (claim.arm, claim.against)
    elif isinstance(claim, Exact):
        named = tuple(term.arm for term in claim.formula.terms if term.arm is not None)
    else:
        named = ()
    return tuple(dict.fromkeys(named))


def needs_runs(claim: Claim) -> bool:
    """Whether anything must run before it can be judged. (A conjunction needs what its parts need.)"""
    if isinstance(claim, Exact):
        return any(term.function == "measured" for term in claim.formula.terms)
    return not isinstance(claim, (Conjunction, NotRunnable))


def is_deterministic(claim: Claim) -> bool:
    """Whether chance has no part in the decision, so that a pocket run may say reproduced or contradicted."""
    return isinstance(claim, Exact)
