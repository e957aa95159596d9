"""The report page: one self-contained HTML file about a study, or about the whole ledger (`self_contained`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.record.atomic import write_text
from lora_lab.record.environment import utc_now
from lora_lab.report.claims_view import ClaimsView
from lora_lab.report.cohort_words import alone_sentences
from lora_lab.report.page_claims import CLAIMS_METHOD, claims_page, run_links
from lora_lab.report.page_cohorts import cohorts_view
from lora_lab.report.page_figures import families
from lora_lab.report.page_layers import routing_view
from lora_lab.report.page_ranking import ranking_view
from lora_lab.report.page_runs import run_blocks, run_columns, run_notes, run_rows
from lora_lab.report.page_settings import settings_data, table_view
from lora_lab.report.page_targets import target_families
from lora_lab.report.page_words import METHOD, effects_view, facts, sections
from lora_lab.report.self_contained import rendered
from lora_lab.report.sentence import answer_sentence
from lora_lab.schema.study import Source
from lora_lab.study.findings import Findings


@dataclass(frozen=True, slots=True)
class Subject:
    """What a page is about. `planned`: runs that were asked for, begun or not; None where nobody said. `claims`: of a
    study that has some."""

    title: str
    question: str
    source: Source | None
    planned: int | None
    ledger: Path
    claims: ClaimsView | None = None


def write_page(path: Path, subject: Subject, findings: Findings) -> None:
    """Draws the page and puts it in place of the earlier one, whole.

    Links to the runs' files are relative, so the page works wherever the lab's folder is moved to.

    Raises:
        MachineError: the disk refuses.
    """
    write_text(path, draw_page(subject, findings, folder=path.parent))


def draw_page(subject: Subject, findings: Findings, *, folder: Path) -> str:
    """The page as HTML. `folder`: where it will be, for the links to the runs' files."""
    records = findings.records
    folders = {record.run_id: _link(record.folder, folder) for record in records}
    table = findings.table
    primary = table.columns[0].name if table.columns else None
    study = None if subject.planned is None else subject.title
    alone = alone_sentences(table.not_alone, study=study, root=subject.ledger)
    drawn = [*families(findings, alone), *target_families(findings)]
    claims = claims_page(subject.claims, run_links(subject.claims, folders, _link(subject.ledger / "runs", folder)))
    of_claims = () if claims is None else claims.figures
    figures = {f"figures-{family.id}": family.figures for family in (*drawn, *of_claims)}
    blocks = {
        "settings-data": settings_data(table, records, folders),
        **run_blocks(records, folders, [column.name for column in table.columns]),
        **figures,
    }
    page: dict[str, Any] = {
        "title": subject.title,
        "kicker": f"Study {subject.title}" if subject.planned is not None else "Every run of the ledger",
        "question": subject.question,
        "answer": answer_sentence(findings.answer),
        "source": _source(subject.source),
        "claims": None if claims is None else claims.view,
        "facts": facts(findings, planned=subject.planned),
        "table": table_view(table, alone),
        "ranking": ranking_view(findings, alone),
        "effects": effects_view(findings),
        "routing": routing_view(findings),
        "families": [family.to_view() for family in drawn],
        "runs": run_rows(records, primary),
        "run_columns": run_columns(primary),
        "run_notes": run_notes(records),
        "cohorts": cohorts_view(findings),
        "method": METHOD if claims is None else (*CLAIMS_METHOD, *METHOD),
        "ledger": subject.ledger.name,
        "drawn_at": utc_now()[:16].replace("T", " ") + " UTC",
    }
    page["sections"] = sections(page)
    return rendered("page.html.j2", page, blocks)


def _link(target: Path, folder: Path) -> str:
    """A relative address that ends with a slash."""
    return Path(os.path.relpath(target, folder)).as_posix() + "/"


def _source(source: Source | None) -> dict[str, str | None] | None:
    if source is None or not (source.title or source.url):
        return None
    is_web = source.url is not None and source.url.startswith(("https://", "http://"))
    return {"title": source.title or source.url, "url": source.url if is_web else None, "notes": source.notes}
