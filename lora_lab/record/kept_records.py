"""Records of a study that are kept beside its file, small enough to commit: enough to derive every verdict again.

They lie as in a lab's folder (`runs/`, `studies/`), so that whatever reads a ledger reads them. Of a run stay the
trial, the result, the step log and the scores of single examples; weights, checkpoints, answers and copies for W&B do
not, nor what names a machine or a folder of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lab.errors import DataError, Problem
from lora_lab.record.atomic import read_json, write_text
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import (
    ENVIRONMENT_FILE,
    HELDOUT_FILE,
    RESULT_FILE,
    STEPS_FILE,
    TRIAL_FILE,
    RunRecord,
)
from lora_lab.record.study_folder import study_folder

FOLDER = "records"
_OF_STUDY = (
    "study.json",
    "runs.json",
    "points.json",
    "registration.json",
    "looks.json",
    "planned.json",
    "verdicts.json",
)
_OF_A_MACHINE = ("hostname", "variables")
_OF_A_SAMPLE = ("doc_id", "doc_hash", "filter", "metrics")
_SAMPLES = re.compile(r"samples_.+\.jsonl")
# An absolute path, and no part of a URL or of a fraction such as tokens/s.
_PATH = re.compile(r"(?<![\w:/.~-])(?:/[^/\s\"']+){2,}/?")


def keep(root: Path, name: str, run_ids: Iterable[str], records: Path) -> list[RunRecord]:
    """Copies a study's files and its runs that have ended; returns those runs. What was kept before is replaced.

    Args:
        root: the lab's folder. name: of the study's folder below it.
        records: where to: beside the study's file (`FOLDER`).

    Raises:
        DataError: a file is damaged. MachineError: the disk refuses.
    """
    source, target = study_folder(root, name), study_folder(records, name)
    for file in _OF_STUDY:
        if (source / file).is_file():
            _write(target / file, _portable(read_json(source / file)))
    wanted = set(run_ids)
    ended = [record for record in Ledger(root).runs() if record.run_id in wanted and record.result is not None]
    for record in ended:
        _keep_run(record, Ledger(records).runs_folder / record.run_id)
    return ended


def _keep_run(record: RunRecord, target: Path) -> None:
    for name in (TRIAL_FILE, RESULT_FILE, ENVIRONMENT_FILE):
        if (record.folder / name).is_file():
            _write(target / name, _portable(read_json(record.folder / name)))
    if record.steps_path.is_file():
        write_text(target / STEPS_FILE, record.steps_path.read_text(encoding="utf-8"))
    heldout = record.eval_folder / HELDOUT_FILE
    if heldout.is_file():
        write_text(target / heldout.relative_to(record.folder), heldout.read_text(encoding="utf-8"))
    for path in _sample_files(record.eval_folder):
        lines = [_line(_of_sample(sample)) for sample in _samples(path)]
        write_text(target / path.relative_to(record.folder), "".join(lines))


def _sample_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.jsonl") if _SAMPLES.fullmatch(path.name))


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(Problem(f"{path}:{number}", f"damaged line: {error}")) from None
        if not isinstance(value, dict):
            raise DataError(Problem(f"{path}:{number}", "expected a JSON object"))
        yield value


def _of_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Which example it is and what it scored, without its texts."""
    names = sample.get("metrics")
    scores = [str(name) for name in names] if isinstance(names, list) else []
    return {key: sample[key] for key in (*_OF_A_SAMPLE, *scores) if key in sample}


def _portable(value: Any) -> Any:
    """Without the names of the machine; of a path the last part."""
    if isinstance(value, Mapping):
        return {key: _portable(one) for key, one in value.items() if key not in _OF_A_MACHINE}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    if isinstance(value, str):
        return _PATH.sub(lambda path: path.group().rstrip("/").rpartition("/")[2], value) if "/" in value else value
    return value


def _write(path: Path, value: Any) -> None:
    write_text(path, _line(value))


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
