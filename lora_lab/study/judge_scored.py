"""Claims about metrics that single examples have: superiority, equality, monotone, best of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.record.result import Status
from lora_lab.schema.claims import FEWEST_SEEDS, BestOf, Equality, Form, Monotone, Superiority, arm_names
from lora_lab.study.arm_scores import ArmScores, arm_scores, floor_or_ceiling
from lora_lab.study.arms import ArmRuns, Evidence, arm_runs, completed, not_pairing
from lora_lab.study.crossed import mean_against_mean, trend
from lora_lab.study.decisions import Ruling, best_of, confidence_of, equality, monotone, step_confidence, superiority
from lora_lab.study.draft import Draft
from lora_lab.study.estimate import Estimate
from lora_lab.study.needed import what_decides
from lora_lab.study.tuned_rates import EXTEND, tuning_reasons
from lora_lab.study.verdict import ArmScore, Contrast
from lora_lab.study.verdict_words import step_back

ScoredClaim = Superiority | Equality | Monotone | BestOf


@dataclass(frozen=True, slots=True)
class _Found:
    """What the rule was given and what it said. estimate: the one that the sentence tells."""

    ruling: Ruling
    estimate: Estimate
    contrasts: tuple[Contrast, ...]


def judge_scored(evidence: Evidence, claim: ScoredClaim, form: Form, members: int) -> Draft:
    """The verdict on one claim in one form. members: of its family.

    Raises:
        InputError: an arm is not exactly one setting.
    """
    arms = [arm_runs(evidence, name, form) for name in arm_names(claim)]
    run_ids = tuple(run_id for arm in arms for run_id in arm.run_ids)
    begun = Draft(metric=claim.metric, run_ids=run_ids)
    if not any(arm.is_begun for arm in arms):
        return begun.undecided("not run", _all_reasons(arms), "the runs of its arms: " + evidence.command)
    reasons = [*_all_reasons(arms), *not_pairing(arms), *_few_seeds(evidence, claim, arms)]
    partly = begun.with_arms([_partly(arm, claim.metric) for arm in arms])
    if reasons:
        return partly.undecided("inconclusive", reasons, _remedy(evidence, arms))
    scores = arm_scores(arms, claim.metric)
    if isinstance(scores, list):
        return partly.undecided("inconclusive", scores, None)
    try:
        found = _ruled(claim, scores, confidence_of(claim.rule, members))
    except ValueError as error:
        return partly.undecided("inconclusive", [f"{', '.join(arm_names(claim))}: {error}"], None)
    draft = begun.with_arms([_arm_score(arm, scores) for arm in arms]).with_ruling(found.ruling)
    draft = draft.changed(unit=scores.metric.unit, estimate=found.estimate, contrasts=found.contrasts)
    if not scores.examples:
        note = f"{claim.metric} is one number per run: the interval covers seeds, not examples"
        draft = draft.changed(notes=(*draft.notes, note))
    return _held_back(evidence, claim, arms, scores, draft)


def _held_back(
    evidence: Evidence, claim: ScoredClaim, arms: Sequence[ArmRuns], scores: ArmScores, draft: Draft
) -> Draft:
    """Undecided after all, where the rate is no fair one or the metric shows nothing; told what decides otherwise."""
    rates = [reason for arm in arms for reason in tuning_reasons(evidence, arm)]
    shows_nothing = floor_or_ceiling(scores, claim.metric)
    if rates:
        remedy = "rates beyond the edge, in another study" if any(EXTEND in one for one in rates) else evidence.command
        return draft.undecided("inconclusive", [*rates, *([shows_nothing] if shows_nothing else [])], remedy)
    if shows_nothing:
        remedy = "a test on which some arm is clear of chance and of the best score there is"
        return draft.undecided("inconclusive", [shows_nothing], remedy)
    edges = [edge for edge in (draft.low, draft.high) if edge is not None]
    if isinstance(claim, Monotone) and draft.decision == "inconclusive" and draft.is_inside:
        step = step_back(draft.contrasts, claim)
        edge = claim.smallest_difference if claim.claimed == "lower" else -claim.smallest_difference
        told = what_decides(step.estimate, step.confidence, [edge], unit="seed")
        return draft.changed(would_decide=f"of {step.name}, {told}")
    if draft.decision == "inconclusive" and draft.estimate is not None and draft.confidence is not None:
        return draft.changed(would_decide=what_decides(draft.estimate, draft.confidence, edges, unit="seed"))
    return draft


def _all_reasons(arms: Sequence[ArmRuns]) -> list[str]:
    return [reason for arm in arms for reason in arm.reasons]


def _remedy(evidence: Evidence, arms: Sequence[ArmRuns]) -> str:
    """A run that diverged has its answer; others are run again."""
    states = [run.record.state for arm in arms for run in arm.runs if run.record is not None]
    if Status.DIVERGED in states:
        return "a learning rate at which no run diverges, in another study"
    return f"the runs that are missing or failed: {evidence.command}"


def _few_seeds(evidence: Evidence, claim: ScoredClaim, arms: Sequence[ArmRuns]) -> list[str]:
    """Trained arms with fewer seeds than the claim, or the study, has declared."""
    needed = max(claim.seeds or len(evidence.design.seeds), FEWEST_SEEDS)
    counts = {arm.name: len(completed(arm)) for arm in arms if not arm.is_base}
    return [f"{name} has {count} of the {needed} seeds needed" for name, count in counts.items() if count < needed]


def _partly(arm: ArmRuns, metric: str) -> ArmScore:
    """An arm by the runs that it has, without a standard error."""
    runs = completed(arm)
    known = [run.result.metrics[metric].value for run in runs if metric in run.result.metrics]
    value = sum(known) / len(known) if known else None
    why = "; ".join(arm.reasons) or (None if known else f"no {metric}")
    return ArmScore(arm.name, value, None, 0 if arm.is_base else len(known), arm.rate, arm.run_ids, why)


def _arm_score(arm: ArmRuns, scores: ArmScores) -> ArmScore:
    seeds = 0 if arm.is_base else len(arm.runs)
    return ArmScore(arm.name, scores.mean(arm.name), scores.error(arm.name), seeds, arm.rate, arm.run_ids, None)


def _ruled(claim: ScoredClaim, scores: ArmScores, confidence: float) -> _Found:
    if isinstance(claim, Monotone):
        return _monotone(claim, scores, confidence)
    if isinstance(claim, BestOf):
        return _best_of(claim, scores, confidence)
    names = (*claim.arm, *claim.against)
    estimate = scores.difference(names, mean_against_mean(len(claim.arm), len(claim.against)))
    if isinstance(claim, Equality):
        ruling = equality(estimate, claim.margin, confidence)
    else:
        ruling = superiority(estimate, claim.claimed, claim.smallest_difference, confidence)
    name = f"{_mean(claim.arm)} - {_mean(claim.against)}"
    return _Found(ruling, estimate, (_contrast(name, estimate, confidence),))


def _monotone(claim: Monotone, scores: ArmScores, confidence: float) -> _Found:
    rise = scores.difference(claim.arms, trend(len(claim.arms)))
    pairs = list(zip(claim.arms[1:], claim.arms, strict=False))
    steps = [scores.difference(pair, (1.0, -1.0)) for pair in pairs]
    ruling = monotone(rise, steps, claim.claimed, claim.smallest_difference, confidence)
    each = step_confidence(confidence, len(steps))
    whole = _contrast(f"from {claim.arms[0]} to {claim.arms[-1]}, on the line", rise, confidence)
    parts = [_contrast(f"{a} - {b}", step, each) for (a, b), step in zip(pairs, steps, strict=True)]
    return _Found(ruling, rise, (whole, *parts))


def _best_of(claim: BestOf, scores: ArmScores, confidence: float) -> _Found:
    others = [name for name in claim.arms if name != claim.best]
    estimates = [scores.difference((claim.best, name), (1.0, -1.0)) for name in others]
    ruling = best_of(estimates, claim.claimed, claim.smallest_difference, confidence)
    sign = 1.0 if claim.claimed == "higher" else -1.0
    closest = min(estimates, key=lambda one: sign * one.difference)
    each = 1 - (1 - confidence) / len(others)
    parts = [_contrast(f"{claim.best} - {name}", one, each) for name, one in zip(others, estimates, strict=True)]
    return _Found(ruling, closest, tuple(parts))


def _contrast(name: str, estimate: Estimate, confidence: float) -> Contrast:
    return Contrast(name, estimate, confidence, *estimate.interval(confidence))


def _mean(arms: Sequence[str]) -> str:
    return arms[0] if len(arms) == 1 else f"mean({', '.join(arms)})"
