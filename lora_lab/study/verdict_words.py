"""Verdicts in words: one sentence with its numbers, no more certain than they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_lab.record.run_record import RunRecord
from lora_lab.schema.claims import (
    BestOf,
    Claim,
    Conjunction,
    Equality,
    Exact,
    Monotone,
    NotRunnable,
    Ratio,
    Superiority,
)
from lora_lab.schema.design import Design
from lora_lab.study.estimate import Estimate
from lora_lab.study.verdict import Contrast, Verdict, lies_inside


def number(value: float) -> str:
    """Four digits, more where the integer part has more."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def place(records: Sequence[RunRecord], design: Design) -> str:
    """The model and the data that runs were made with, as `MODEL, DATA`; those of the design where there are none."""
    trials = [record.trial for record in records if record.header is not None]
    if not trials:
        named = [str(design.base[key]) for key in ("model", "data") if key in design.base]
        return ", ".join(named)
    models = dict.fromkeys(_model(trial.get("model", {})) for trial in trials)
    data = dict.fromkeys(_data(trial.get("data", {})) for trial in trials)
    return ", ".join(" and ".join(one for one in names if one) for names in (models, data) if any(names))


def _model(section: dict[str, Any]) -> str:
    """An embedded model is named by its file, others by the end of their name."""
    text = str(section.get("file") or section.get("name") or section.get("kind") or "")
    name = text.rpartition("/")[2]
    return name.partition(".Q")[0].removesuffix(".gguf") if section.get("file") else name


def _data(section: dict[str, Any]) -> str:
    text = str(section.get("name") or section.get("path") or section.get("kind") or "")
    return text.rstrip("/").rpartition("/")[2]


def sentence_of(verdict: Verdict, claim: Claim, where: str, besides: Sequence[str] = ()) -> str:
    """The sentence. where: as `place` gives it. besides: what must be said in it, at its end."""
    word = verdict.word[0].upper() + verdict.word[1:]
    head = word if isinstance(claim, (Exact, NotRunnable)) or not where else f"{word} on {where}"
    parts = [text for text in (_finding(verdict, claim), _why(verdict, claim)) if text]
    return f"{head}: {'; '.join([*parts, *besides]).removesuffix('.')}."


def _why(verdict: Verdict, claim: Claim) -> str | None:
    """Why it is not decided, and what else a reader must know at once."""
    if verdict.reasons:
        rest = len(verdict.reasons) - 1
        more = f" (and {rest} more {'reason' if rest == 1 else 'reasons'})" if rest else ""
        return verdict.reasons[0] + more
    if isinstance(claim, Monotone) and verdict.decision in ("fails", "inconclusive") and _is_inside(verdict):
        step = step_back(verdict.contrasts, claim)
        ends = f"{percent(step.confidence)} interval {number(step.interval_low)} to {number(step.interval_high)}"
        return f"but a step goes back: {step.name} is {number(step.estimate.difference)} ({ends})"
    if verdict.decision == "inconclusive" and verdict.interval_low is not None:
        return "the interval lies on both sides of what is needed"
    if verdict.decision == "fails" and isinstance(claim, (Superiority, Monotone)) and not _is_reversed(verdict, claim):
        return "the difference is smaller than the smallest of interest, not shown to be reversed"
    return None


def _is_inside(verdict: Verdict) -> bool:
    return lies_inside((verdict.interval_low, verdict.interval_high), verdict.low, verdict.high)


def step_back(contrasts: Sequence[Contrast], claim: Monotone) -> Contrast:
    """Of the steps, which come after the rise on the whole, the one that goes farthest against the claim."""
    sign = 1 if claim.claimed == "higher" else -1
    return min(contrasts[1:], key=lambda one: sign * one.estimate.difference)


def _is_reversed(verdict: Verdict, claim: Superiority | Monotone) -> bool:
    """Whether the whole interval is on the other side of zero than claimed."""
    if verdict.interval_low is None or verdict.interval_high is None:
        return False
    return verdict.interval_high < 0 if claim.claimed == "higher" else verdict.interval_low > 0


def _finding(verdict: Verdict, claim: Claim) -> str | None:
    if isinstance(claim, Exact):
        return _formula(verdict, claim)
    if verdict.estimate is None and verdict.value is None:
        return None
    if isinstance(claim, Ratio):
        return _ratio(verdict, claim)
    if isinstance(claim, (NotRunnable, Conjunction)) or verdict.estimate is None:
        return None
    return f"{_difference(verdict.estimate, verdict, claim)} ({_evidence(verdict, verdict.estimate)})"


def _difference(estimate: Estimate, verdict: Verdict, claim: Claim) -> str:
    size, unit = number(abs(estimate.difference)), verdict.unit or ""
    direction = "above" if estimate.difference > 0 else "below"
    if isinstance(claim, Monotone):
        verb = "rises" if estimate.difference > 0 else "falls"
        return f"{verdict.metric} {verb} by {size} {unit} along {', '.join(claim.arms)} (on the straight line)"
    if isinstance(claim, BestOf):
        rival = closest_rival(verdict, claim)
        return (
            f"{verdict.metric} of {claim.best} is {size} {unit} {direction} that of {rival}, the closest of the others"
        )
    if isinstance(claim, (Superiority, Equality)):
        return f"{verdict.metric} of {mean_of(claim.arm)} is {size} {unit} {direction} that of {mean_of(claim.against)}"
    raise TypeError(f"no difference of a {claim.rule} claim")


def closest_rival(verdict: Verdict, claim: BestOf) -> str:
    """The arm whose contrast with the best one is the verdict's estimate."""
    name = next((one.name for one in verdict.contrasts if one.estimate == verdict.estimate), "")
    return name.removeprefix(f"{claim.best} - ")


def mean_of(arms: Sequence[str]) -> str:
    """One side of a comparison: an arm, or the mean of several."""
    return arms[0] if len(arms) == 1 else f"the mean of {', '.join(arms)}"


def _evidence(verdict: Verdict, estimate: Estimate) -> str:
    assert verdict.confidence is not None and verdict.interval_low is not None and verdict.interval_high is not None
    counts = []
    if estimate.seeds:
        counts.append(f"{estimate.seeds} seeds")
    if estimate.examples:
        counts.append(f"{estimate.examples} examples")
    ends = f"{number(verdict.interval_low)} to {number(verdict.interval_high)}"
    return f"{percent(verdict.confidence)} interval {ends}, needed {needed(verdict)}; {', '.join(counts)}"


def percent(confidence: float) -> str:
    """A confidence in percent."""
    return f"{100 * confidence:.4g} %"


def needed(verdict: Verdict) -> str:
    """Where the difference or value must lie for the claim to hold."""
    if verdict.low is None:
        return f"below {number(verdict.high or 0.0)}"
    if verdict.high is None:
        return f"above {number(verdict.low)}"
    return f"{number(verdict.low)} to {number(verdict.high)}"


def _ratio(verdict: Verdict, claim: Ratio) -> str:
    assert verdict.value is not None
    told = f"{claim.measure} of {claim.arm} is {number(verdict.value)} times that of {claim.against}"
    if verdict.interval_low is None or verdict.interval_high is None or verdict.confidence is None:
        return f"{told} (needed {needed(verdict)}; all runs agree)"
    ends = f"{number(verdict.interval_low)} to {number(verdict.interval_high)}"
    count = 0 if verdict.estimate is None else verdict.estimate.seeds
    per = "repeats" if verdict.unit == "ratio of times" else "seeds"
    return f"{told} ({percent(verdict.confidence)} interval {ends}, needed {needed(verdict)}; {count} {per})"


def _formula(verdict: Verdict, claim: Exact) -> str | None:
    if verdict.value is None:
        return None
    numbers = [f"{one.id} = {_plain(one.value)}{f' {one.unit}' if one.unit else ''}" for one in claim.published]
    terms = [f"{arm.name} = {_sized(arm.name, arm.value)}" for arm in verdict.arms if arm.value is not None]
    told = ", ".join([*numbers, *terms])
    return f"{number(verdict.value)} where {needed(verdict)} is needed; it is {claim.value}" + (
        f" with {told}" if told else ""
    )


def _plain(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def _sized(name: str, value: float) -> str:
    """Bytes as GB of 1e9 bytes, since nobody reads ten digits; the files have them all."""
    return f"{number(value / 1e9)} GB" if "_bytes" in name and value >= 1e9 else _plain(value)
