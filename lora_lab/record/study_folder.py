"""What a study leaves under ROOT/studies/NAME: what it asked (`study.json`), its runs (`runs.json`), table and page.

`study.json` and `runs.json` are written before the first run, so that a killed sweep can be shown too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_lab.errors import DataError, InputError, Problem, nearest
from lora_lab.record.atomic import read_json, write_json
from lora_lab.record.ledger import Ledger
from lora_lab.record.repeats import trial_part, with_repeats
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.study import Study

_STUDIES = "studies"
_STUDY_FILE = "study.json"
_RUNS_FILE = "runs.json"
_TABLE_FILE = "table.json"
_PAGE_FILE = "report.html"


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """A study as it was asked for. `study` is None where only its list of runs is there (an older lab wrote it)."""

    folder: Path
    study: Study | None
    run_ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """The study's name, which is its folder's."""
        return self.folder.name

    @property
    def metrics(self) -> tuple[str, ...] | None:
        """The metrics that its file names, the first the primary one; None where it names none."""
        return (self.study.metrics or None) if self.study is not None else None

    def records(self, ledger: Ledger) -> list[RunRecord]:
        """Its runs that have begun, in the order in which they were asked for, with other repeats of its trials."""
        return with_repeats(ledger, self.run_ids)

    def has(self, run_id: str) -> bool:
        """Whether a run is of one of its trials."""
        return trial_part(run_id) in set(map(trial_part, self.run_ids))


def study_folder(root: Path, name: str) -> Path:
    """Where a study's files are, begun or not."""
    return root / _STUDIES / name


def begin_study(root: Path, study: Study, run_ids: Sequence[str]) -> Path:
    """Writes what is asked for; returns the study's folder.

    Raises:
        MachineError: the disk refuses.
    """
    folder = study_folder(root, study.name)
    write_json(folder / _STUDY_FILE, study.model_dump(mode="json"))
    write_json(folder / _RUNS_FILE, {"runs": list(run_ids)})
    return folder


def write_table(folder: Path, table: dict[str, Any]) -> None:
    """Puts the study's table in place; raises MachineError where the disk refuses."""
    write_json(folder / _TABLE_FILE, table)


def page_path(folder: Path) -> Path:
    """Where the page of a study, or of the whole ledger, is kept."""
    return folder / _PAGE_FILE


def study_names(root: Path) -> list[str]:
    """Studies that were begun under this root."""
    return sorted(path.parent.name for path in (root / _STUDIES).glob(f"*/{_RUNS_FILE}"))


def read_study(root: Path, name: str, *, where: str = "study") -> StudyRecord:
    """A study that was begun here. `where`: what the name was given as.

    Raises:
        InputError: there is none of that name. DataError: its files are damaged.
    """
    known = study_names(root)
    if name not in known:
        raise InputError(Problem(where, f'no study "{name}" has been run under {root}' + nearest(name, known)))
    folder = root / _STUDIES / name
    path = folder / _RUNS_FILE
    content = read_json(path)
    listed = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise DataError(Problem(str(path), 'damaged: expected {"runs": [names]}; run the study again to mend it'))
    return StudyRecord(folder, _study(folder / _STUDY_FILE), tuple(listed))


def _study(path: Path) -> Study | None:
    if not path.is_file():
        return None
    try:
        return Study.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            Problem(str(path), f"damaged: {where}: {first['msg']}; run the study again to mend it")
        ) from None
