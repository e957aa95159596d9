"""Judging: every claim of a study, from the runs of a ledger and the files beside them. Reads only.

A claim is decided by its rule (`decisions`) or it is not decided, and then every reason is given: a run that is gone or
diverged, too few seeds, other examples, a rate at the edge of its grid, an accuracy at the floor. Nothing that is
missing is made up for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from lora_lab.record.ledger import Ledger
from lora_lab.record.study_points import StudyPoint
from lora_lab.schema.claims import (
    Claim,
    Conjunction,
    Exact,
    Form,
    NotRunnable,
    Ratio,
    Scale,
    needs_runs,
)
from lora_lab.schema.study import Study
from lora_lab.study.arms import Evidence, Planned
from lora_lab.study.conjunction import judge_conjunction
from lora_lab.study.draft import Draft
from lora_lab.study.judge_costs import judge_exact, judge_ratio
from lora_lab.study.judge_scored import judge_scored
from lora_lab.study.verdict import Verdict, word_of
from lora_lab.study.verdict_words import place, sentence_of

_INTERVALS = ("superiority", "equality", "monotone", "best_of", "ratio")


def judge_study(
    study: Study,
    scale: Scale,
    points: Sequence[StudyPoint],
    planned: Planned,
    ledger: Ledger,
    *,
    seeds: Sequence[int] | None = None,
    registered_at: str | None = None,
) -> list[Verdict]:
    """A verdict for every claim at this scale and each of its forms, in the order of the file.

    points: as `points.json` has them, of all stages; a claim over planned quantities of the published design finds
    them among points of the stage `planned`. Rates that tuning picked stand in the points; they are picked again from
    the tuning runs, and another outcome is a reason not to decide. seeds: of a later look, which is judged on them
    alone; None: those of the design. registered_at: when the criteria were fixed (UTC); runs that ended before are
    counted in the verdict.

    Raises:
        InputError: the study has no such scale; an arm picks no setting, or several.
    """
    evidence = Evidence(
        study=study,
        scale=scale,
        points=tuple(points),
        planned=planned,
        records={record.run_id: record for record in ledger.runs()},
        seeds=tuple(seeds or ()) or study.design(scale).seeds,
        registered_at=registered_at,
    )
    claims = claims_judged(study, scale)
    verdicts: dict[str, list[Verdict]] = {}
    for claim in _parts_first(claims):
        if isinstance(claim, Conjunction):
            verdicts[claim.id] = judge_conjunction(claim, scale, verdicts)
        else:
            verdicts[claim.id] = [_verdict(evidence, claim, form, claims) for form in forms_of(claim)]
    return [verdict for claim in claims for verdict in verdicts[claim.id]]


def claims_judged(study: Study, scale: Scale) -> list[Claim]:
    """The claims of a scale, and those that need no runs, which are judged at every scale."""
    by_id = {claim.id: claim for claim in study.claims}

    def is_here(claim: Claim, above: tuple[str, ...] = ()) -> bool:
        if scale in claim.scales:
            return True
        if isinstance(claim, Conjunction):
            return claim.id not in above and all(is_here(by_id[one], (*above, claim.id)) for one in claim.parts)
        return not needs_runs(claim)

    return [claim for claim in study.claims if is_here(claim)]


def forms_of(claim: Claim) -> tuple[Form | None, ...]:
    """The forms in which a claim is judged; None alone for claims that have none."""
    return getattr(claim, "forms", (None,))


def family_size(claim: Claim, claims: Iterable[Claim]) -> int:
    """How many intervals the claim's family has at a scale: claims times forms. 1 without a family."""
    if claim.family is None:
        return 1
    return sum(len(forms_of(one)) for one in claims if one.family == claim.family and one.rule in _INTERVALS)


def _parts_first(claims: Sequence[Claim]) -> list[Claim]:
    """Conjunctions after their parts. Of those that are parts of each other the later ones find no verdict."""
    by_id = {claim.id: claim for claim in claims}
    order: dict[str, Claim] = {}

    def add(claim: Claim, above: tuple[str, ...]) -> None:
        if isinstance(claim, Conjunction):
            for part in claim.parts:
                if part in by_id and part not in above:
                    add(by_id[part], (*above, claim.id))
        order.setdefault(claim.id, claim)

    for claim in claims:
        add(claim, ())
    return list(order.values())


def _verdict(evidence: Evidence, claim: Claim, form: Form | None, claims: Sequence[Claim]) -> Verdict:
    draft = _draft(evidence, claim, form, family_size(claim, claims))
    records = [evidence.records[run_id] for run_id in draft.run_ids if run_id in evidence.records]
    early = _ended_before(evidence, draft.run_ids)
    said = word_of(draft.decision, claim, evidence.scale)
    with_early = draft.changed(notes=(*draft.notes, *early))
    verdict = with_early.verdict(claim.id, form, evidence.scale, word=said)
    return verdict.saying(sentence_of(verdict, claim, place(records, evidence.design), early))


def _draft(evidence: Evidence, claim: Claim, form: Form | None, members: int) -> Draft:
    if isinstance(claim, NotRunnable):
        return Draft().undecided("not runnable", [claim.reason], None)
    if isinstance(claim, Exact):
        return judge_exact(evidence, claim)
    assert form is not None and not isinstance(claim, Conjunction)
    if isinstance(claim, Ratio):
        return judge_ratio(evidence, claim, form, members)
    return judge_scored(evidence, claim, form, members)


def _ended_before(evidence: Evidence, run_ids: Sequence[str]) -> list[str]:
    """How many runs the criteria may have been fitted to."""
    if evidence.registered_at is None:
        return []
    fixed = datetime.fromisoformat(evidence.registered_at)
    results = [evidence.records[one].result for one in dict.fromkeys(run_ids) if one in evidence.records]
    ended = [result for result in results if result is not None]
    early = sum(datetime.fromisoformat(result.finished_at) < fixed for result in ended)
    return [f"{early} of {len(ended)} runs had ended before the criteria were fixed"] if early else []
