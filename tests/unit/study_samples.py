"""Runs and table rows for tests of statistics, made in memory: nothing is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunHeader, RunRecord
from lora_lab.study.cells import Cell, Point
from lora_lab.study.interval import t_interval
from lora_lab.study.table import MetricColumn, SettingRow, SettingsTable
from tests.unit.ledger_samples import digest, loss, setting_of

LOSS = MetricColumn("heldout/loss", "nats/token", higher_is_better=False, chance=None)
ACCURACY = MetricColumn("skills/acc", "fraction", higher_is_better=True, chance=0.25)


def record_of(
    trial: dict[str, Any],
    *,
    scores: Mapping[str, float] | None = None,
    status: Status = Status.COMPLETED,
    identities: Mapping[str, str] | None = None,
    **changes: Any,
) -> RunRecord:
    """A run that ended; `changes` are fields of its result."""
    known = {"data": "texts", **(identities or {})}
    fingerprint = digest((trial, known))
    setting = setting_of(trial) if identities is None else digest((setting_of(trial), known))
    header = RunHeader(
        schema_version=1,
        run_id=fingerprint[:16],
        name=f"{trial['method']['kind']}-r{trial['rank']}-s{trial['seed']}",
        fingerprint=fingerprint,
        setting=setting,
        repeat=0,
        attempt=1,
        numerics_version=1,
        tag=None,
        claimed_at="2026-01-01T00:00:00.000+00:00",
        machine_id="m1",
        identities=known,
        trial=trial,
    )
    fields: dict[str, Any] = {
        "schema_version": 1,
        "numerics_version": 1,
        "run_id": header.run_id,
        "fingerprint": fingerprint,
        "setting": setting,
        "repeat": 0,
        "attempt": 1,
        "status": status,
        "reason": None,
        "started_at": header.claimed_at,
        "finished_at": header.claimed_at,
        "trainable_parameters": 1000,
        "total_parameters": 20000,
        "predicted_peak_allocated_bytes": None,
        "metrics": {name: loss(value) for name, value in (scores or {}).items()},
        "measurements": {},
        "facts": {},
        "missing": {},
    }
    return RunRecord(Path("runs") / header.run_id, header, Result(**{**fields, **changes}), status, None, None)


def cell_of(values: Mapping[int, float] | Sequence[float]) -> Cell:
    """A cell from scores by seed; a sequence is seeds 0, 1, ..."""
    scores = values if isinstance(values, Mapping) else dict(enumerate(values))
    if not scores:
        return Cell((), None, None, "no completed run")
    points = tuple(Point(f"run{seed}", seed, value, None) for seed, value in scores.items())
    numbers = list(scores.values())
    return Cell(points, sum(numbers) / len(numbers), t_interval(numbers) if len(numbers) > 2 else None, None)


def row_of(
    name: str,
    values: Mapping[int, float] | Sequence[float],
    *,
    column: MetricColumn = LOSS,
    cost: Mapping[str, float] | None = None,
    statuses: Mapping[str, int] | None = None,
    **changes: Any,
) -> SettingRow:
    """A setting's row with scores by one metric."""
    cell = cell_of(values)
    fields: dict[str, Any] = {
        "name": name,
        "setting": digest(name),
        "is_base": False,
        "axes": {},
        "statuses": dict(statuses) if statuses is not None else {"COMPLETED": len(cell.points)} if cell.points else {},
        "reasons": (),
        "trials": sum((statuses or {"COMPLETED": len(cell.points)}).values()),
        "trials_completed": len(cell.points),
        "runs_alone": len(cell.points),
        "last_repeat": 0,
        "trainable_parameters": 1000,
        "total_parameters": 20000,
        "predicted_peak_allocated_bytes": None,
        "cells": {column.name: cell},
        "cost": dict(cost or {}),
        "missing": {},
    }
    return SettingRow(**{**fields, **changes})


def base_row(value: float | None, **changes: Any) -> SettingRow:
    """The untouched base with one score; None has none."""
    return row_of("base", [] if value is None else [value], is_base=True, **changes)


def table_of(*rows: SettingRow, column: MetricColumn | None = LOSS, problems: Sequence[str] = ()) -> SettingsTable:
    """A table of one metric."""
    return SettingsTable(() if column is None else (column,), rows, 1, tuple(problems))
