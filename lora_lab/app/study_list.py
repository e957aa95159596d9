"""`reproduce --list`: every study with its claims, what it costs, and what was found so far. Nothing is composed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_lab.app.locations import sweep_folders
from lora_lab.app.study_verdicts import judge_folder
from lora_lab.errors import InputError, LabError
from lora_lab.plan.shown_study import folder_name
from lora_lab.plan.study_file import read_study
from lora_lab.record.kept_records import FOLDER
from lora_lab.record.study_folder import study_folder
from lora_lab.record.verdicts import read_verdicts
from lora_lab.report.grid import Column, Grid, console_for, print_grid, print_line
from lora_lab.report.text import seconds_text
from lora_lab.schema.claims import Scale
from lora_lab.schema.study import Study
from lora_lab.study.study_cost import busy_seconds, count_runs, results_of

NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class ListedStudy:
    """A study at one scale.

    runs: how many it makes, tuning and clock with them. seconds: the wall-clock time in which the recorded ones ran;
    None where none is. verdicts: how often each word was said, of every claim in every form. judged: whether by the
    user's own ledger or by the records that came with the study; None where neither. problem: what is wrong with it.
    """

    name: str
    scale: Scale
    question: str
    source: str | None
    url: str | None
    claims: int
    runs: int
    recorded_runs: int
    seconds: float | None
    verdicts: Mapping[str, int]
    judged: str | None
    problem: str | None


def list_studies(root: Path, *, as_json: bool) -> int:
    """Prints every study; returns the exit code (2 where a file cannot be read)."""
    listed: list[ListedStudy] = []
    problems: list[str] = []
    for path in study_files(sweep_folders()):
        try:
            study = read_study(path)
        except InputError as error:
            problems += map(str, error.problems)
            continue
        listed += [_listed(study, scale, root, path.parent / FOLDER) for scale in study.scales]
    if as_json:
        json.dump([asdict(one) for one in listed], sys.stdout, indent=2)
        print()
    else:
        _print(listed)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def study_files(folders: Sequence[Path]) -> list[Path]:
    """Study files by name; of one name that which `reproduce` takes."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


def _listed(study: Study, scale: Scale, root: Path, records: Path) -> ListedStudy:
    name = folder_name(study.name, scale)
    claims = len(study.claims_at(scale))
    said: Mapping[str, int] = {NOT_RUN: claims} if claims else {}
    judged, problem = None, None
    place = root
    for place, told in ((root, "own ledger"), (records, "kept records")):
        known = read_verdicts(study_folder(place, name))
        if known is None or known.newest is None:  # nothing there, or begun and not judged yet
            continue
        judged = told
        try:  # by the runs that are there now: a verdict whose run was deleted since does not stay
            said = dict(Counter(one.word for one in judge_folder(place, name, study, scale).verdicts))
        except LabError as error:
            said, problem = {}, str(error.problems[0])
        break
    results = results_of(place, name) if judged is not None else []
    return ListedStudy(
        name=study.name,
        scale=scale,
        question=study.question,
        source=None if study.source is None else study.source.title,
        url=None if study.source is None else study.source.url,
        claims=claims,
        runs=count_runs(study.design(scale)),
        recorded_runs=len(results),
        seconds=busy_seconds(results) if results else None,
        verdicts=said,
        judged=judged,
        problem=problem,
    )


def _print(listed: Sequence[ListedStudy]) -> None:
    console = console_for(None)
    columns = (
        Column("study"),
        Column("scale"),
        Column("claims", is_number=True),
        Column("runs", is_number=True),
        Column("took", is_number=True, is_optional=True),
        Column("verdicts"),
        Column("by", is_optional=True),
        Column("source", is_optional=True),
    )
    print_grid(console, Grid(columns, tuple(map(_cells, listed))))
    for one in listed:
        if one.problem is not None:
            print_line(console, f"{one.name} ({one.scale}): {one.problem}")


def _cells(one: ListedStudy) -> tuple[str, ...]:
    verdicts = ", ".join(f"{count} {word}" for word, count in one.verdicts.items())
    verdicts = verdicts or ("no claims" if one.problem is None else "not judged: see below")
    took = "" if one.seconds is None else seconds_text(one.seconds)
    return (one.name, one.scale, str(one.claims), str(one.runs), took, verdicts, one.judged or "", one.source or "")
