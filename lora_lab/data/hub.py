"""Rows of a data set on the Hugging Face hub, or of a local folder of parquet, JSON or CSV files in its place.

`columns` maps the columns of our row formats to those of the data set. Three rules cover the published sets without
code of their own: a dot reaches into a nested column (`context.contexts`); a list of texts in the place of one text is
joined by line feeds (the paragraphs of an abstract); a list of texts as `messages` is a conversation that the user
begins, of which a last turn without an answer is left out (LIMA).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_lab.data.formats import OPTIONAL, REQUIRED, detect_format, record_problems, row_of, type_problems
from lora_lab.data.heldout import SHOWN_PROBLEMS, more_problems, split_rows
from lora_lab.data.rows import Row, Rows
from lora_lab.errors import DataError, IdentityError, InputError, MachineError, Problem, nearest
from lora_lab.schema.data import HubData

_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_hub(data: HubData, *, cache: Path) -> Rows:
    """Training and held-out rows (a split by seed, see `split_rows`); downloads are kept under `cache`.

    Raises:
        InputError: `columns` names columns of no format. MachineError: the hub cannot be reached.
        IdentityError: another revision than the declared one is all that is in the cache.
        DataError: no such data set, revision, split or column, or rows that are not of the format.
    """
    row_format = _format_of(data)
    table = _fetch(data, cache)
    _check_columns(data, table.column_names)
    rows: list[Row] = []
    problems: list[Problem] = []
    for source, record, named in _records(data, table):
        wrong = [*record_problems(record, row_format, complete=False), *type_problems(named, data.type_column)]
        problems += [Problem(source, message) for message in wrong]
        if not wrong:
            row_type = None if data.type_column is None else named[data.type_column]
            rows.append(row_of(record, row_format, source, row_type=row_type))
    if problems:
        raise DataError([*problems[:SHOWN_PROBLEMS], *more_problems(len(problems), "problems")])
    if not rows:
        raise DataError(Problem(f"{data.repo}:{data.split}", "0 records"))
    return split_rows(rows, heldout_size=data.heldout_size, seed=data.heldout_seed, where=f"{data.repo}:{data.split}")


def _format_of(data: HubData) -> str:
    known = sorted({column for names in (*REQUIRED.values(), *OPTIONAL.values()) for column in names})
    unknown = [column for column in data.columns if column not in known]
    if unknown:
        raise InputError([Problem(f"data.columns.{name}", "no such column" + nearest(name, known)) for name in unknown])
    row_format = detect_format(data.columns) if data.format == "auto" else data.format
    if row_format is None or any(column not in data.columns for column in REQUIRED[row_format]):
        shapes = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in REQUIRED.items())
        raise InputError(Problem("data.columns", f"must name the columns of a format ({shapes})"))
    return row_format


def _fetch(data: HubData, cache: Path) -> Any:
    try:
        table = datasets.load_dataset(
            data.repo, name=data.config, split=data.split, revision=data.revision, cache_dir=str(cache / "datasets")
        )
    except LocalEntryNotFoundError as error:
        raise _unreachable(data, error) from None
    except (DatasetNotFoundError, DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise DataError(Problem(data.repo, f"cannot be loaded ({_one_line(error)})")) from None
    except OSError as error:  # ConnectionError, time-outs, HTTP errors, a full disk
        raise _unreachable(data, error) from None
    _check_revision(data, table)
    return table


def _check_revision(data: HubData, table: Any) -> None:
    """Without a network `datasets` takes any revision that is in its cache; its folder says which that is."""
    for file in table.cache_files:
        found = Path(file["filename"]).parent.name
        if _COMMIT.fullmatch(data.revision) and _COMMIT.fullmatch(found) and found != data.revision:
            raise IdentityError(Problem(data.repo, f"revision {found} is in the cache, not {data.revision}"))


def _unreachable(data: HubData, error: Exception) -> MachineError:
    return MachineError(
        Problem(
            data.repo,
            f"cannot be fetched from the hub ({_one_line(error)}). Without a network: copy the data set to a folder "
            "and give data.repo=FOLDER, or use data=jsonl data.path=FILE",
        )
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _check_columns(data: HubData, found: list[str]) -> None:
    problems = [
        Problem(f"data.{ours}", f'{data.repo} has no column "{theirs}"' + nearest(theirs.split(".")[0], found))
        for ours, theirs in _wanted(data).items()
        if theirs.split(".")[0] not in found
    ]
    if problems:
        raise DataError(problems)


def _wanted(data: HubData) -> dict[str, str]:
    """Key below `data` -> column of the data set."""
    columns = {f"columns.{ours}": theirs for ours, theirs in data.columns.items()}
    return columns if data.type_column is None else columns | {"type_column": data.type_column}


def _records(data: HubData, table: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Source, record in our columns, and the type by its column: in the data set that may be called as one of ours."""
    for index, example in enumerate(table):
        record = {ours: _value(ours, _reach(example, theirs)) for ours, theirs in data.columns.items()}
        named = {} if data.type_column is None else {data.type_column: _reach(example, data.type_column)}
        yield f"{data.repo}:{data.split}:{index}", record, named


def _reach(example: Any, path: str) -> Any:
    """The value at a dotted path; None where the path ends early, which the check of the record reports."""
    for step in path.split("."):
        example = example.get(step) if isinstance(example, Mapping) else None
    return example


def _value(column: str, value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        return value
    if column != "messages":
        return "\n".join(value)
    answered = value[: len(value) - len(value) % 2]
    roles = cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, answered, strict=False)]
