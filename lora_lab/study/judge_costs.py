"""Claims about costs and counts: ratios of what runs measured, and formulas in which chance has no part."""

from __future__ import annotations

import math

from lora_lab.schema.claims import Exact, Form, Ratio
from lora_lab.schema.formula import Term
from lora_lab.study.arms import Evidence
from lora_lab.study.cost import is_time
from lora_lab.study.crossed import crossed
from lora_lab.study.decisions import FEWEST_REPEATS, confidence_of, exact, ratio_bounds
from lora_lab.study.draft import Draft
from lora_lab.study.needed import what_decides
from lora_lab.study.quantities import Costs, NotKnownError, ratio_costs, term_value
from lora_lab.study.verdict import ArmScore, Decision


def judge_ratio(evidence: Evidence, claim: Ratio, form: Form, members: int) -> Draft:
    """The verdict on a ratio of costs in one form. members: of its family.

    Raises:
        InputError: an arm is not exactly one setting.
    """
    unit = "ratio of times" if is_time(claim.measure) else "ratio"
    begun = Draft(metric=claim.measure, low=claim.low, high=claim.high, unit=unit)
    try:
        costs = ratio_costs(evidence, claim, form)
    except NotKnownError as error:
        return _not_known(evidence, begun, error)
    draft = begun.changed(arms=costs.arms, run_ids=costs.run_ids, notes=costs.notes)
    if costs.is_exact:
        a, b = costs.pairs[0]
        return draft.changed(value=a / b).with_ruling(exact(a / b, claim.low, claim.high))
    logs = costs.log_ratios
    draft = draft.changed(value=math.exp(math.fsum(logs) / len(logs)))
    if len(logs) < FEWEST_REPEATS:
        why = (
            f"{claim.arm} and {claim.against}: {len(logs)} {costs.per}s, and fewer than {FEWEST_REPEATS} decide nothing"
        )
        return draft.undecided("inconclusive", [why], None)
    ruling = ratio_bounds(logs, claim.low, claim.high, confidence_of(claim.rule, members))
    return _with_remedy(draft.changed(estimate=crossed([[value] for value in logs])).with_ruling(ruling), claim, costs)


def _with_remedy(draft: Draft, claim: Ratio, costs: Costs) -> Draft:
    edges = [math.log(edge) for edge in (claim.low, claim.high) if edge is not None and edge > 0]
    if draft.decision != "inconclusive" or draft.estimate is None or draft.confidence is None or not edges:
        return draft
    return draft.changed(would_decide=what_decides(draft.estimate, draft.confidence, edges, unit=costs.per))


def judge_exact(evidence: Evidence, claim: Exact) -> Draft:
    """The verdict on a formula: holds or fails wherever every number in it is known.

    Raises:
        InputError: an arm is not exactly one setting.
    """
    begun = Draft(metric=claim.value, low=claim.low, high=claim.high, unit="")
    known: dict[Term, float] = {}
    terms: list[ArmScore] = []
    unknown: list[NotKnownError] = []
    for term in claim.formula.terms:
        try:
            known[term], run_ids = term_value(evidence, claim, term)
        except NotKnownError as error:
            unknown.append(error)
            continue
        if term.arm is not None:
            terms.append(ArmScore(str(term), known[term], None, 0, None, run_ids, None))
    draft = begun.changed(arms=tuple(terms), run_ids=tuple(one for term in terms for one in term.run_ids))
    if unknown:
        is_begun = bool(terms) or any(error.is_begun for error in unknown)
        reasons = [reason for error in unknown for reason in error.reasons]
        return _not_known(evidence, draft, NotKnownError(reasons, is_begun=is_begun, run_ids=draft.run_ids))
    try:
        value = claim.formula.value(lambda term: known[term])
    except ValueError as error:
        return draft.undecided("inconclusive", [str(error)], None)
    return draft.changed(value=value).with_ruling(exact(value, claim.low, claim.high))


def _not_known(evidence: Evidence, draft: Draft, error: NotKnownError) -> Draft:
    decision: Decision = "inconclusive" if error.is_begun else "not run"
    draft = draft.changed(run_ids=error.run_ids or draft.run_ids)
    return draft.undecided(decision, error.reasons, f"the numbers that are missing: {evidence.command}")
