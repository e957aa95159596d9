"""Rows of a local JSON-lines file, checked line by line before any model loads. Imports neither torch nor transformers.

A file is UTF-8 (a byte-order mark and CRLF are accepted), one JSON object per line, plain or gzip. Lines of white space
are passed over but counted, so that line numbers are those an editor shows. Columns that the format does not use may
hold anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.data.formats import detect_format, record_problems, row_of, type_problems, unknown_format
from lora_lab.data.heldout import SHOWN_PROBLEMS, count_duplicates, more_problems, refuse_overlap, split_rows
from lora_lab.data.lines import Line, file_sha256, read_lines
from lora_lab.data.row_types import types_of
from lora_lab.data.rows import Row, Rows
from lora_lab.errors import DataError, LabError, Problem
from lora_lab.schema.data import JsonlData


@dataclass(frozen=True, slots=True)
class JsonlSummary:
    """What `check_jsonl` found in usable files.

    rows: rows to train on. duplicates: those of them that repeat an earlier one. heldout_asked is what the
    configuration wants; a held-out file with fewer rows gives all it has. notes: sentences for the user. types: of the
    rows to train on, each with the line where it is first.
    """

    rows: int
    heldout_rows: int
    heldout_asked: int
    duplicates: int
    sha256: str
    heldout_sha256: str | None
    notes: tuple[str, ...]
    types: Mapping[str, str]


def check_jsonl(data: JsonlData) -> JsonlSummary:
    """Reads and judges all that a trial would read; the same errors as `load_jsonl`."""
    rows = load_jsonl(data)
    duplicates = count_duplicates(rows.train)
    notes = []
    if duplicates:
        notes.append(f"{data.path}: {duplicates} of {len(rows.train)} training rows repeat an earlier row")
    if len(rows.heldout) < data.heldout_size:
        notes.append(f"{data.heldout_path}: {len(rows.heldout)} rows, fewer than heldout_size ({data.heldout_size})")
    heldout = None if data.heldout_path is None else file_sha256(_path(data.heldout_path))
    return JsonlSummary(
        rows=len(rows.train),
        heldout_rows=len(rows.heldout),
        heldout_asked=data.heldout_size,
        duplicates=duplicates,
        sha256=file_sha256(_path(data.path)),
        heldout_sha256=heldout,
        notes=tuple(notes),
        types=types_of(rows.train),
    )


def load_jsonl(data: JsonlData) -> Rows:
    """Training and held-out rows.

    With `heldout_path`: its first `heldout_size` rows (or all, if fewer), none of which may equal a training row.
    Without: a split of the one file, see `split_rows`.

    Raises:
        DataError: with the problems of both files, each as `path:line` (the first 20 per file, and how many there are).
    """
    if data.heldout_path is None:
        rows = read_rows(_path(data.path), data.format, type_column=data.type_column)
        return split_rows(rows, heldout_size=data.heldout_size, seed=data.heldout_seed, where=data.path)
    sides: list[list[Row]] = []
    problems: list[Problem] = []
    for path in (data.path, data.heldout_path):
        try:
            sides.append(read_rows(_path(path), data.format, type_column=data.type_column))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    train, heldout = sides[0], sides[1][: data.heldout_size]
    refuse_overlap(train, heldout)
    return Rows(train, heldout)


def read_rows(path: Path, row_format: str, *, type_column: str | None = None) -> list[Row]:
    """All rows of one file. row_format: a key of `formats.REQUIRED`, or `auto`, which the first record decides.

    type_column: the column that names a row's type, if rows have types.

    Raises:
        DataError: no such file, no rows, or the problems of all lines.
    """
    rows: list[Row] = []
    found = _Problems()
    chosen = None if row_format == "auto" else row_format
    for line, record in _records(path, found):
        chosen = chosen or detect_format(record)
        if chosen is None:
            found.add(path, line, unknown_format(record))
            break
        problems = [*record_problems(record, chosen, complete=True), *type_problems(record, type_column)]
        for problem in problems:
            found.add(path, line, problem)
        if not problems:
            row_type = None if type_column is None else record[type_column]
            rows.append(row_of(record, chosen, f"{path}:{line}", row_type=row_type))
    found.raise_if_any()
    if not rows:
        raise DataError(Problem(str(path), "0 records"))
    return rows


class _Problems:
    """The first SHOWN_PROBLEMS problems of a file, and how many there were."""

    def __init__(self) -> None:
        self.shown: list[Problem] = []
        self.count = 0

    def add(self, path: Path, line: int, message: str) -> None:
        self.extend([Problem(f"{path}:{line}", message)])

    def extend(self, problems: list[Problem]) -> None:
        self.count += len(problems)
        self.shown += problems[: max(0, SHOWN_PROBLEMS - len(self.shown))]

    def raise_if_any(self) -> None:
        if self.shown:
            raise DataError([*self.shown, *more_problems(self.count, "problems")])


def _records(path: Path, found: _Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every good line; what is wrong with the others goes to `found`."""
    try:
        for line in read_lines(path):
            if not line.content.strip():
                continue
            try:
                yield line.number, _parse(line)
            except _BadLineError as problem:
                found.add(path, line.number, str(problem))
    except LabError as error:  # the file itself gives out: keep what its earlier lines had wrong
        found.extend(list(error.problems))


class _BadLineError(ValueError):
    pass


def _parse(line: Line) -> dict[str, Any]:
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line.content[error.start]
        raise _BadLineError(f"not UTF-8 at byte {error.start + 1} of the line (0x{byte:02X})") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise _BadLineError(_json_message(error, line)) from None
    except RecursionError:
        raise _BadLineError("nested too deeply") from None
    except _BadLineError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise _BadLineError(f"not usable JSON: {error}") from None
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else type(value).__name__
        raise _BadLineError(f"expected one JSON object per line, got {kind}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise _BadLineError(f'key "{repeated}" given twice')
    return value


def _constant(name: str) -> float:
    return float(name)  # NaN or Infinity: harmless in an unused column, refused as "not text" in a used one


def _json_message(error: json.JSONDecodeError, line: Line) -> str:
    if error.msg.startswith("Invalid control character"):
        return f"control character U+{ord(error.doc[error.pos]):04X} at column {error.pos + 1} (must be escaped)"
    if not line.ended and not line.content.rstrip().endswith(b"}"):
        return "incomplete line (file cut off?)"
    if line.number == 1 and line.content.lstrip().startswith(b"["):
        return "looks like one JSON array over many lines; write one object per line"
    return f"not valid JSON at column {error.pos + 1}: {error.msg}"


def _path(path: str) -> Path:
    return Path(path).expanduser()
