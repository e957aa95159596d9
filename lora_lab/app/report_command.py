"""`lora-lab report [STUDY]`: the page of a study, or of every run of the ledger. No torch, no Hydra."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_lab.app.ledger_commands import add_root, open_ledger
from lora_lab.app.study_changed import refuse_changed
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from lora_lab.record.study_folder import StudyRecord, page_path, read_study
from lora_lab.report.page import Subject, write_page
from lora_lab.report.sentence import answer_sentence
from lora_lab.schema.study import Study
from lora_lab.study.findings import Findings, findings_of, study_findings

_FIRST_METRIC = "heldout/loss"


def main(arguments: Sequence[str]) -> int:
    """Runs `report ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="lora-lab report",
        description="Draw the page of a study (or, without a name, of every run): one HTML file that needs no network.",
    )
    add_root(parser)
    parser.add_argument("study", nargs="?", help="a study that was run here; without it, the whole ledger")
    parser.add_argument("--output", type=Path, help="file to write (default: ROOT/studies/STUDY/report.html)")
    parser.add_argument("--json", action="store_true", help="print table, effects and answer as JSON; draw nothing")
    options = parser.parse_args(arguments[1:])
    ledger = open_ledger(options.root)
    asked = None if options.study is None else read_study(ledger.root, options.study)
    if asked is not None:
        refuse_changed(asked)
    subject, findings = _view(ledger, asked)
    if options.json:
        json.dump(_as_json(subject, findings), sys.stdout, indent=2, allow_nan=False)
        print()
        return 0
    path = _place(ledger, asked) if options.output is None else options.output
    write_page(path, subject, findings)
    print(answer_sentence(findings.answer))
    print(path)
    return 0


def draw_page(ledger: Ledger, study: Study | None) -> None:
    """Draws the page of a study that was begun, or of the whole ledger, in its usual place; raises as `main`."""
    asked = None if study is None else read_study(ledger.root, study.name)
    write_page(_place(ledger, asked), *_view(ledger, asked))


def _place(ledger: Ledger, asked: StudyRecord | None) -> Path:
    return page_path(ledger.root if asked is None else asked.folder)


def _view(ledger: Ledger, asked: StudyRecord | None) -> tuple[Subject, Findings]:
    return ledger_view(ledger) if asked is None else study_view(ledger, asked)


def study_view(ledger: Ledger, asked: StudyRecord) -> tuple[Subject, Findings]:
    """A study and what was found so far; raises InputError where its runs cannot stand in one table."""
    return _subject(asked, ledger), study_findings(asked, ledger)


def _subject(asked: StudyRecord, ledger: Ledger) -> Subject:
    study = asked.study
    return Subject(
        title=asked.name,
        question=asked.name if study is None else study.question,
        source=None if study is None else study.source,
        planned=len({*asked.run_ids, *(record.run_id for record in asked.records(ledger))}),
        ledger=ledger.root,
    )


def ledger_view(ledger: Ledger) -> tuple[Subject, Findings]:
    """Every run of the ledger; where several numerics versions made them, only those of the newest."""
    subject = Subject(
        title=ledger.root.name or "ledger",
        question="All runs of this ledger",
        source=None,
        planned=None,
        ledger=ledger.root,
    )
    records = _of_newest_numerics(ledger.runs())
    return subject, findings_of(records, metrics=_every_metric(records) or None)


def _every_metric(records: Sequence[RunRecord]) -> list[str]:
    """All metrics of completed runs, the held-out loss first."""
    found = [name for record in records if record.result is not None for name in record.result.metrics]
    return sorted(dict.fromkeys(found), key=lambda name: name != _FIRST_METRIC)


def _of_newest_numerics(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Scores by different arithmetic cannot stand in one table."""
    versions = [record.numerics_version for record in records if record.numerics_version is not None]
    newest = max(versions, default=None)
    return [record for record in records if record.numerics_version in (None, newest)]


def _as_json(subject: Subject, findings: Findings) -> dict[str, object]:
    return {
        "title": subject.title,
        "question": subject.question,
        "answer": answer_sentence(findings.answer),
        **findings.to_json(),
    }
