"""What `reproduce` prints: the verdicts of a study, claim by claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console

from lora_lab.plan.shown_study import file_name
from lora_lab.report.claims_view import form_text
from lora_lab.report.grid import console_for, print_line
from lora_lab.schema.claims import Scale
from lora_lab.schema.study import Study
from lora_lab.study.verdict import Verdict

# By decision, not by word: what holds at pocket scale is green too.
_STYLES: Mapping[str, str] = {"holds": "green", "fails": "red", "inconclusive": "yellow"}


def print_verdicts(
    study: Study,
    scale: Scale,
    verdicts: Sequence[Verdict],
    *,
    seeds: Sequence[int] = (),
    looks: int = 1,
    stream: TextIO | None = None,
) -> None:
    """The statement and the sentence of every claim, what would decide it, and how often each word was said.

    looks: how many sets of seeds were looked at; these verdicts are of `seeds`.
    """
    console = console_for(stream)
    statements = {claim.id: claim.statement for claim in study.claims}
    name = file_name(study.name, scale)
    if not verdicts:
        print_line(console, f"{name} has no claims at the scale {scale}")
        return
    before = ""
    for verdict in verdicts:
        if verdict.claim != before:
            print_line(console, f"{verdict.claim}: {statements.get(verdict.claim, '')}", style="bold")
            before = verdict.claim
        _print_verdict(console, verdict)
    counts = Counter(verdict.word for verdict in verdicts)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    print_line(console, f"{name} ({scale}): {told}")
    if looks > 1:
        shown = ", ".join(map(str, seeds))
        print_line(console, f"{looks} looks were taken at this study; these verdicts are of the seeds {shown}")


def _print_verdict(console: Console, verdict: Verdict) -> None:
    form = form_text(verdict.form)
    print_line(console, f"  {form}: {verdict.sentence}" if form else f"  {verdict.sentence}", style=_style(verdict))
    for note in verdict.notes:
        if note not in verdict.sentence:
            print_line(console, f"    note: {note}", style="dim")
    for reason in verdict.reasons[1:]:
        print_line(console, f"    also: {reason}", style="dim")
    if verdict.would_decide is not None:
        print_line(console, f"    would decide it: {verdict.would_decide}", style="dim")


def _style(verdict: Verdict) -> str:
    return _STYLES.get(verdict.decision, "dim")
