"""A slice of the ledger as flat rows, and the formats people load them with: CSV, parquet, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lora_lab.record.atomic import write_bytes
from lora_lab.record.flat import dotted
from lora_lab.record.predicted_peak import ERROR, peaks_of
from lora_lab.record.run_record import RunRecord

Row = dict[str, Any]

# A spreadsheet runs a text cell that begins like this as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def rows_of(records: Iterable[RunRecord]) -> list[Row]:
    """One flat row per run: identity, outcome, the trial's dotted keys, metrics, measurements.

    A metric NAME has a second column `NAME:standard_error` (over examples). The error of the predicted peak is a
    fraction of the measured one. What was not measured is absent from the row; `missing` says why, as JSON text.
    """
    return [_row(record) for record in records]


def _row(record: RunRecord) -> Row:
    row: Row = {"run_id": record.run_id, "name": record.name, "status": str(record.state), "reason": record.problem}
    header, result = record.header, record.result
    if header is not None:
        row |= {
            "attempt": header.attempt,
            "repeat": header.repeat,
            "fingerprint": header.fingerprint,
            "setting": header.setting,
            "numerics_version": header.numerics_version,
            "tag": header.tag,
            "machine_id": header.machine_id,
        }
        row |= {key: _cell(value) for key, value in dotted(header.trial).items()}
    if result is not None:
        row["reason"] = record.problem or result.reason
        row |= {
            "started_at": result.started_at,
            "finished_at": result.finished_at,
            "trainable_parameters": result.trainable_parameters,
            "total_parameters": result.total_parameters,
            "predicted_peak_allocated_bytes": result.predicted_peak_allocated_bytes,
        }
        if (peaks := peaks_of(result)) is not None:
            row[ERROR] = peaks.error
        for name, metric in result.metrics.items():
            row[name] = metric.value
            row[f"{name}:standard_error"] = metric.standard_error
        row |= result.measurements
        row |= {f"facts.{key}": _cell(value) for key, value in dotted(result.facts).items()}
        row["missing"] = json.dumps(result.missing, sort_keys=True) if result.missing else None
    return row


def _cell(value: object) -> Any:
    """Scalars stay; lists and empty mappings become JSON text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value, sort_keys=True)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all columns in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def to_csv(rows: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """CSV with a header line. Absent is empty; text that a spreadsheet would run gets a leading apostrophe."""
    columns = columns_of(rows)
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_csv_text(column) for column in columns])
    for row in rows:
        writer.writerow([_csv_cell(row.get(column)) for column in columns])


def _csv_cell(value: object) -> str | int | float | None:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, (int, float)):
        return value
    return _csv_text(str(value))


def _csv_text(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # csv quotes a newline but not a lone carriage return
    return f"'{text}" if text.startswith(_FORMULA) else text


def to_json(rows: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """A JSON array of objects, strict (no NaN)."""
    json.dump([dict(row) for row in rows], stream, indent=2, allow_nan=False, ensure_ascii=False)
    stream.write("\n")


def to_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A parquet file, written atomically. A column that mixes text and numbers becomes text.

    Raises:
        MachineError: the disk refuses.
    """
    import pyarrow as pa  # half a second to import; only this function needs it
    import pyarrow.parquet as pq

    columns = {name: _uniform([row.get(name) for row in rows]) for name in columns_of(rows)}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_bytes(path, buffer.getvalue())


def _uniform(values: list[Any]) -> list[Any]:
    kinds = {_kind(value) for value in values if value is not None}
    if len(kinds) <= 1:
        return values
    if kinds == {"integer", "real"}:
        return [None if value is None else float(value) for value in values]
    return [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int):
        return "integer"
    return "real" if isinstance(value, float) else "text"
