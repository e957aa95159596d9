"""Flat rows of the ledger, and the files people load them with."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from lora_lab.record.export import rows_of, to_csv, to_json, to_parquet
from lora_lab.record.result import Status
from tests.unit.ledger_samples import ended, loss, trial_of


def _records(root: Path) -> list:
    return [
        ended(
            root,
            trial_of(seed=0),
            metrics={"heldout/loss": loss(2.5)},
            measurements={"train_seconds": 12.5, "peak_allocated_bytes": 10**9},
        ),
        ended(root, trial_of(seed=1), status=Status.DIVERGED, reason="=HYPERLINK(1)", missing={"eval_seconds": "no"}),
    ]


def test_rows_hold_identity_settings_scores_and_cost(tmp_path: Path) -> None:
    first, second = rows_of(_records(tmp_path))
    assert first["status"] == "COMPLETED" and first["attempt"] == 1
    assert first["rank"] == 8 and first["model.name"] == "tiny_random" and first["target.modules"] == "[]"
    assert first["heldout/loss"] == 2.5 and first["heldout/loss:standard_error"] == 0.01
    assert first["train_seconds"] == 12.5
    assert second["status"] == "DIVERGED" and "heldout/loss" not in second, "missing is absent, not zero"
    assert json.loads(second["missing"]) == {"eval_seconds": "no"}


def test_a_damaged_run_is_a_row_with_its_problem(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    (record.folder / "result.json").write_text("{")
    from lora_lab.record.run_record import read_record

    (row,) = rows_of([read_record(record.folder)])
    assert row["status"] == "DAMAGED" and "result.json:1" in row["reason"]


def test_csv_keeps_numbers_and_disarms_formulas(tmp_path: Path) -> None:
    stream = io.StringIO()
    to_csv(rows_of(_records(tmp_path)), stream)
    first, second = csv.DictReader(io.StringIO(stream.getvalue()))
    assert first["heldout/loss"] == "2.5" and second["heldout/loss"] == ""
    assert second["reason"] == "'=HYPERLINK(1)"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ("@x", "'@x"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\n=1"),
        ("a=1", "a=1"),
        (-1.5, "-1.5"),
        (-3, "-3"),
        (True, "true"),
        (None, ""),
        (1e-05, "1e-05"),
    ],
)
def test_csv_cells(value: object, cell: str) -> None:
    stream = io.StringIO(newline="")
    to_csv([{"x": value, "end": 1}], stream)
    rows = list(csv.reader(io.StringIO(stream.getvalue(), newline="")))
    assert rows[1] == [cell, "1"]


def test_csv_of_nothing_is_an_empty_header() -> None:
    stream = io.StringIO()
    to_csv([], stream)
    assert stream.getvalue() == "\n"


def test_parquet_is_typed_and_takes_mixed_columns(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "runs.parquet"
    rows = [
        {"rank": 8, "loss": 2, "mode": "off", "only": None, "flag": True},
        {"rank": 16, "loss": 2.5, "mode": 4, "late": "x", "flag": None},
    ]
    to_parquet(rows, path)
    table = pq.read_table(path)
    assert table.to_pydict() == {
        "rank": [8, 16],
        "loss": [2.0, 2.5],
        "mode": ["off", "4"],
        "only": [None, None],
        "flag": [True, None],
        "late": [None, "x"],
    }
    assert str(table.schema.field("rank").type) == "int64" and str(table.schema.field("loss").type) == "double"
    to_parquet(rows_of(_records(tmp_path / "lab")), path)
    assert pq.read_table(path).num_rows == 2


def test_json_is_strict(tmp_path: Path) -> None:
    stream = io.StringIO()
    to_json(rows_of(_records(tmp_path)), stream)
    assert [row["status"] for row in json.loads(stream.getvalue())] == ["COMPLETED", "DIVERGED"]
    with pytest.raises(ValueError, match="Out of range"):
        to_json([{"x": float("nan")}], io.StringIO())
