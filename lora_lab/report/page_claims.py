"""The claims of a study as its page shows them: verdict, published numbers against ours, figure, and what is behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_lab.record.run_record import RESULT_FILE
from lora_lab.report.claim_cards import figure_of
from lora_lab.report.claim_numbers import arm_rows, noise_view
from lora_lab.report.claim_rules import forms_text, link_of, published_text, rule_text
from lora_lab.report.claims_view import ClaimsView, form_text
from lora_lab.report.page_figures import Family
from lora_lab.report.text import clean, seconds_text
from lora_lab.schema.claims import Claim, Published
from lora_lab.study.study_cost import busy_seconds
from lora_lab.study.verdict import Verdict

_TONES: Mapping[str, str] = {"holds": "good", "fails": "bad", "inconclusive": "warn"}
_DIGITS = 12

CLAIMS_METHOD = (
    "Criteria, grids and seeds of a claim are fixed before its first run; their hash is on this page. A claim holds or "
    "fails where its whole interval lies inside or outside of the region that it names, and is inconclusive where the "
    "interval crosses an edge. Reproduced and contradicted are said of the published set-up, and of claims without "
    "chance in them; a run at pocket scale says same direction or opposite direction, on its model and data.",
    "Differences are paired by seed and by example: all seeds see the same examples. Their variance has a part that "
    "more seeds make smaller and a part that more examples make smaller; both together are the noise floor. Seeds that "
    "are added later are another look, judged by themselves.",
)


@dataclass(frozen=True, slots=True)
class ClaimsPage:
    """What the template gets, and the figures of the cards."""

    view: dict[str, Any]
    figures: tuple[Family, ...]


def claims_page(claims: ClaimsView | None, links: Mapping[str, str]) -> ClaimsPage | None:
    """The section of claims; None of a study without any. links: by run id, where its runs' pages and files are."""
    if claims is None or not claims.study.claims:
        return None
    by_claim: dict[str, list[Verdict]] = {}
    for verdict in claims.verdicts:
        by_claim.setdefault(verdict.claim, []).append(verdict)
    shown = [claim for claim in claims.study.claims if claim.id in by_claim]
    figures = {claim.id: figure_of(claim, by_claim[claim.id], claims) for claim in shown}
    view = {
        "answer": tally_sentence(claims),
        "lead": _lead(claims),
        "cards": [_card(claim, by_claim[claim.id], claims, figures[claim.id], links) for claim in shown],
        "registration": _registration(claims),
        "command": claims.command,
        "elsewhere": _elsewhere(claims, {claim.id for claim in shown}),
        "differences": _notes(claims),
    }
    return ClaimsPage(view, tuple(one for one in figures.values() if one is not None))


def run_links(claims: ClaimsView | None, on_page: Mapping[str, str], ledger: str) -> dict[str, str]:
    """Where a reader gets from a run's id: its part of this page, or its result's file. on_page: folders of the runs
    that the page holds; ledger: the address of the ledger's folder of runs."""
    links = {run_id: f"#run-{run_id}" for run_id in on_page}
    for run_id in () if claims is None else claims.records:
        links.setdefault(run_id, f"{ledger}{run_id}/{RESULT_FILE}")
    return links


def tally_sentence(claims: ClaimsView) -> str:
    """How often each word was said."""
    counts = Counter(verdict.word for verdict in claims.verdicts)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    number = len({verdict.claim for verdict in claims.verdicts})
    several = " (some in two forms)" if len(claims.verdicts) > number else ""
    return f"{number} claim{'' if number == 1 else 's'}{several}: {told}."


def _lead(claims: ClaimsView) -> str:
    forms = "A claim whose source fixed one learning rate is judged as published, and with the rate tuned per arm."
    return forms if any(verdict.form == "tuned" for verdict in claims.verdicts) else ""


def _card(
    claim: Claim, verdicts: Sequence[Verdict], claims: ClaimsView, figure: Family | None, links: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "id": claim.id,
        "statement": clean(claim.statement),
        "verdicts": [_verdict(verdict) for verdict in verdicts],
        "figure": None if figure is None else figure.to_view(),
        "published": [_published(one) for one in claim.published],
        "arms": arm_rows(verdicts, claims.records, links),
        "counted": "repeats" if any(verdict.unit == "ratio of times" for verdict in verdicts) else "seeds",
        "has_forms": any(verdict.form is not None for verdict in verdicts),
        "rule": clean(rule_text(claim, claims.study)),
        "forms": forms_text(claim),
        "noise": [noise for verdict in verdicts if (noise := noise_view(verdict)) is not None],
        "cost": _cost(verdicts, claims),
        "differences": clean(claim.differences or ""),
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    told = [note for note in verdict.notes if note not in verdict.sentence]
    sentence = clean(verdict.sentence)
    begins = len(verdict.word) if sentence.lower().startswith(verdict.word.lower()) else 0
    return {
        "form": form_text(verdict.form),
        "word": verdict.word,
        "tone": _TONES.get(verdict.decision, "muted"),
        "head": sentence[:begins],
        "sentence": sentence[begins:],
        "reasons": [clean(one) for one in verdict.reasons[1:]],
        "notes": [clean(one) for one in told],
        "would_decide": None if verdict.would_decide is None else clean(verdict.would_decide),
    }


def _published(one: Published) -> dict[str, Any]:
    provenance = clean(one.provenance)
    return {
        "what": clean(one.what),
        "value": clean(published_text(one)),
        "provenance": provenance,
        "url": link_of(one.provenance),
    }


def _cost(verdicts: Sequence[Verdict], claims: ClaimsView) -> str:
    ids = dict.fromkeys(run_id for verdict in verdicts for arm in verdict.arms for run_id in arm.run_ids)
    results = [record.result for one in ids if (record := claims.records.get(one)) is not None]
    ended = [result for result in results if result is not None]
    if not ended:
        return ""
    runs = f"{len(ended)} run{'' if len(ended) == 1 else 's'}"
    return f"{runs}, {seconds_text(busy_seconds(ended))} of work going on; tuning not counted"


def _registration(claims: ClaimsView) -> list[dict[str, str]]:
    known = claims.registration
    if known is None:
        return [{"name": "registered", "value": "not yet: nothing was run by lora-lab reproduce", "title": ""}]
    pairs = [
        ("registered", _moment(known.registered_at), known.registered_at),
        ("hash of the criteria", known.digest[:_DIGITS], known.digest),
        ("scale", claims.scale, ""),
        ("looks", _looks(claims), ""),
        ("runs that ended before", _ended_before(claims, known.registered_at), ""),
    ]
    return [{"name": name, "value": clean(value), "title": title} for name, value, title in pairs]


def _looks(claims: ClaimsView) -> str:
    looks = claims.looks
    if not looks:
        return "none was begun"
    each = [f"{_seeds(one.seeds)} from {_moment(one.begun_at)}" for one in looks]
    if len(looks) == 1:
        return f"1 ({each[0]})"
    return f"{len(looks)} ({'; '.join(each)}); judged here: {_seeds(claims.seeds)}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seeds {', '.join(map(str, seeds))}" if seeds else "the study's own seeds"


def _ended_before(claims: ClaimsView, registered_at: str) -> str:
    results = [record.result for record in claims.records.values() if record.result is not None]
    fixed = datetime.fromisoformat(registered_at)
    early = sum(datetime.fromisoformat(one.finished_at) < fixed for one in results)
    return f"{early or 'none'} of {len(results)}"


def _moment(text: str) -> str:
    return text[:16].replace("T", " ") + " UTC"


def _elsewhere(claims: ClaimsView, here: set[str]) -> list[str]:
    """Claims of the other scale."""
    return [f"{one.id}: {clean(one.statement)}" for one in claims.study.claims if one.id not in here]


def _notes(claims: ClaimsView) -> str:
    source = claims.study.source
    return "" if source is None or source.notes is None else clean(source.notes)
