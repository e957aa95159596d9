"""Rules of decision in words: what a claim compares, and where the interval or value must lie for it to hold."""

from __future__ import annotations

from lora_lab.schema.claims import (
    BestOf,
    Claim,
    Conjunction,
    Equality,
    Exact,
    Monotone,
    NotRunnable,
    Published,
    Ratio,
    Superiority,
)
from lora_lab.schema.study import Study
from lora_lab.study.decisions import confidence_of
from lora_lab.study.judge import claims_judged, family_size, forms_of
from lora_lab.study.verdict_words import mean_of, percent

_DIRECTIONS = {"higher": "above", "lower": "below"}
_INTERVALS = {
    "superiority": "interval",
    "equality": "interval",
    "monotone": "interval",
    "best_of": "intervals",
    "ratio": "interval of the log ratios",
}


def rule_text(claim: Claim, study: Study) -> str:
    """The rule of one claim as a sentence without its point; confidences as its family has them where it is judged."""
    if isinstance(claim, Conjunction):
        return f"all of {', '.join(claim.parts)} hold"
    if isinstance(claim, NotRunnable):
        return "not runnable here"
    if isinstance(claim, Exact):
        return f"{claim.value} is {_region(claim.low, claim.high)}"
    return f"{_comparison(claim)} ({_interval(claim, study)})"


def _comparison(claim: Superiority | Equality | Monotone | BestOf | Ratio) -> str:
    if isinstance(claim, Ratio):
        return f"{claim.measure} of {claim.arm} / that of {claim.against} is {_region(claim.low, claim.high)}"
    if isinstance(claim, Equality):
        sides = f"{mean_of(claim.arm)} and of {mean_of(claim.against)}"
        return f"{claim.metric} of {sides} differ by less than {claim.margin:g}"
    more = f" by more than {claim.smallest_difference:g}" if claim.smallest_difference else ""
    if isinstance(claim, Superiority):
        sides = f"{mean_of(claim.arm)} is {_DIRECTIONS[claim.claimed]} that of {mean_of(claim.against)}"
        return f"{claim.metric} of {sides}{more}"
    if isinstance(claim, Monotone):
        verb = "rises" if claim.claimed == "higher" else "falls"
        along = f"{', '.join(claim.arms)}{more} on the straight line"
        return f"{claim.metric} {verb} along {along}, with no clear step back"
    others = ", ".join(name for name in claim.arms if name != claim.best)
    return f"{claim.metric} of none of {others} is {_DIRECTIONS[claim.claimed]} that of {claim.best}{more}"


def _region(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {plain(high or 0.0)}"
    if high is None:
        return f"at least {plain(low)}"
    return plain(low) if low == high else f"from {plain(low)} to {plain(high)}"


def plain(value: float) -> str:
    """A number of a study's file, as people write it: no exponent where it is a whole number."""
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.10g}"


def _interval(claim: Superiority | Equality | Monotone | BestOf | Ratio, study: Study) -> str:
    """The whole interval beyond the edge: at which confidence, and why."""
    sizes = {family_size(claim, claims_judged(study, scale)) for scale in claim.scales if scale in study.scales}
    told = " or ".join(percent(confidence_of(claim.rule, size)) for size in sorted(sizes or {1}))
    family = f", one of {' or '.join(map(str, sorted(sizes)))} of the family {claim.family}" if claim.family else ""
    return f"{told} {_INTERVALS[claim.rule]}{family}"


def forms_text(claim: Claim) -> str:
    """The forms in which a claim is judged, where there are several."""
    forms = [form.replace("_", " ") for form in forms_of(claim) if form is not None]
    return " and ".join(forms) if len(forms) > 1 or "tuned" in forms else ""


def published_text(number: Published) -> str:
    """A published number with its unit."""
    return f"{plain(number.value)} {number.unit}".rstrip()


def link_of(provenance: str) -> str | None:
    """The address that a provenance begins with, where it begins with one."""
    first = provenance.split()[0] if provenance.split() else ""
    return first.rstrip(".,;") if first.startswith(("https://", "http://")) else None
