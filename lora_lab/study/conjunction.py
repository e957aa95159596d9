"""Conjunctions: all parts hold. One part that fails decides; one that is not decided leaves the whole undecided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_lab.schema.claims import Conjunction, Form, Scale
from lora_lab.study.draft import Draft
from lora_lab.study.verdict import Decision, Verdict, word


def judge_conjunction(claim: Conjunction, scale: Scale, verdicts: Mapping[str, Sequence[Verdict]]) -> list[Verdict]:
    """A verdict in each form that all parts with forms have. verdicts: of the claims judged before, by id."""
    parts = {one: verdicts.get(one, ()) for one in claim.parts}
    with_forms = [{one.form for one in found if one.form} for found in parts.values() if any(one.form for one in found)]
    shared = set.intersection(*with_forms) if with_forms else set()
    forms: list[Form | None] = [form for form in ("as_published", "tuned") if form in shared] or [None]
    return [_of_form(claim, scale, form, parts) for form in forms]


def _of_form(claim: Conjunction, scale: Scale, form: Form | None, parts: Mapping[str, Sequence[Verdict]]) -> Verdict:
    chosen: dict[str, Verdict | None] = {}
    for name, found in parts.items():
        chosen[name] = next((one for one in found if one.form == form), found[0] if found else None)
        if form is None and with_forms(found):
            chosen[name] = None
    decision, reasons = _decided(chosen, form)
    known = [one for one in chosen.values() if one is not None]
    settled = [one for one in known if one.decision == "fails"] if decision == "fails" else known
    firm = [one.word == word(one.decision, firm=True) for one in settled]
    said = word(decision, firm=any(firm) if decision == "fails" else bool(firm) and all(firm))
    told = ", ".join(f"{name}: {'not judged' if one is None else one.word}" for name, one in chosen.items())
    remedy = "; ".join(
        f"{one.claim}: {one.would_decide}" for one in known if one.would_decide and one.decision != "holds"
    )
    draft = Draft(
        decision=decision,
        reasons=reasons,
        notes=tuple(dict.fromkeys(note for one in known for note in one.notes)),
        would_decide=None if decision in ("holds", "fails") else remedy or None,
    )
    sentence = f"{said[0].upper()}{said[1:]}: all of its parts must hold ({told})."
    return draft.verdict(claim.id, form, scale, word=said, sentence=sentence)


def with_forms(found: Sequence[Verdict]) -> bool:
    """Whether a claim was judged in several forms, of which none is the one."""
    return len(found) > 1


def _decided(chosen: Mapping[str, Verdict | None], form: Form | None) -> tuple[Decision, tuple[str, ...]]:
    decisions = [None if one is None else one.decision for one in chosen.values()]
    if "fails" in decisions:
        return "fails", ()
    if all(one == "holds" for one in decisions):
        return "holds", ()
    reasons = []
    for name, one in chosen.items():
        if one is None:
            reasons.append(f"{name} is not judged here" + (f" in the form {form}" if form else " in the same form"))
        elif one.decision != "holds":
            reasons.append(f"{name} is {one.decision}" + (f": {one.reasons[0]}" if one.reasons else ""))
    is_begun = any(one in ("holds", "inconclusive") for one in decisions)
    return ("not run" if "not run" in decisions and not is_begun else "inconclusive"), tuple(reasons)
