"""The table of settings as the page shows it: texts, sort keys, and a mark in each cell for mean and interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.record.cohort_facts import why_missing
from lora_lab.record.run_record import RunRecord
from lora_lab.report.cohort_words import empty_columns
from lora_lab.report.text import (
    bytes_text,
    cell_text,
    clean,
    count_text,
    number_text,
    seconds_text,
    stopped_notes,
    value_text,
)
from lora_lab.study.cells import Cell
from lora_lab.study.cost import is_time
from lora_lab.study.table import MetricColumn, SettingRow, SettingsTable

# What a setting costs, as columns: key, title, how it is written.
COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("trainable_parameters", "trainable", count_text),
    ("peak_allocated_bytes", "peak memory", bytes_text),
    ("train_seconds", "train time", seconds_text),
    ("tokens_per_second", "tokens/s", lambda value: "-" if value is None else f"{value:,.0f}"),
)
SETTING_DIGITS = 12
# Colour-blind safe (Paul Tol, "bright"), readable on light and dark.
PALETTE = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#EE8866", "#999933", "#882255", "#44AA99")
BASE_COLOUR = "#8A8F98"


def setting_id(row: SettingRow) -> str:
    """Short name of a setting inside a page; twelve digits of its fingerprint."""
    return row.setting[:SETTING_DIGITS]


def colours_of(table: SettingsTable) -> dict[str, str]:
    """One colour per setting fingerprint, the same in every figure; untouched bases are grey."""
    trained = [row.setting for row in table.rows if not row.is_base]
    colours = {setting: PALETTE[index % len(PALETTE)] for index, setting in enumerate(trained)}
    return colours | {row.setting: BASE_COLOUR for row in table.rows if row.is_base}


def cost_value(row: SettingRow, key: str) -> float | int | None:
    """A cost of a setting by name; None where it was not measured."""
    return row.trainable_parameters if key == "trainable_parameters" else row.cost.get(key)


@dataclass(frozen=True, slots=True)
class Scale:
    """The ends of a column."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Where a value stands between them, in percent."""
        span = self.high - self.low
        return round(50.0 if span <= 0 else 4 + 92 * (value - self.low) / span, 1)


def table_view(table: SettingsTable, alone: Sequence[str] = ()) -> dict[str, Any]:
    """Columns, rows and notes for the template. `alone`: what is said of settings without a run made alone."""
    colours = colours_of(table)
    scales = {column.name: scale_of([row.cells[column.name] for row in table.rows]) for column in table.columns}
    best = {column.name: _best(table.rows, column) for column in table.columns}
    return {
        "columns": [heading("seeds", "", "completed runs"), *map(metric_heading, table.columns), *_headings()],
        "rows": [
            {
                "id": setting_id(row),
                "name": clean(row.name),
                "is_base": row.is_base,
                "colour": colours[row.setting],
                "cells": [
                    _seeds_cell(row),
                    *(
                        metric_cell(row.cells[c.name], scales[c.name], is_best=row.cells[c.name].mean == best[c.name])
                        for c in table.columns
                    ),
                    *(_cost_cell(row, key, write) for key, _, write in COSTS),
                ],
            }
            for row in table.rows
        ],
        "legend": _legend(table),
        "notes": _notes(table, alone),
    }


def _headings() -> list[dict[str, Any]]:
    return [heading(title, "", key.replace("_", " ")) for key, title, _ in COSTS]


def heading(title: str, unit: str, hint: str) -> dict[str, Any]:
    """A column's heading."""
    return {"title": title, "unit": unit, "hint": hint, "arrow": "", "direction": ""}


def metric_heading(column: MetricColumn) -> dict[str, Any]:
    """The heading of a column of scores, with the way that is better."""
    chance = "" if column.chance is None else f"; chance {number_text(column.chance)}"
    return {
        **heading(clean(column.name), clean(column.unit), f"{clean(column.name)} in {clean(column.unit)}{chance}"),
        "arrow": "↑" if column.higher_is_better else "↓",
        "direction": "higher is better" if column.higher_is_better else "lower is better",
    }


def scale_of(cells: Sequence[Cell]) -> Scale:
    """The scale on which all points and intervals of a column have a place."""
    ends: list[float] = []
    for cell in cells:
        ends += [point.value for point in cell.points]
        if cell.interval is not None:
            ends += [cell.interval.low, cell.interval.high]
    return Scale(min(ends, default=0.0), max(ends, default=0.0))


def _best(rows: Sequence[SettingRow], column: MetricColumn) -> float | None:
    """The best mean of several that may be compared; it says nothing about whether the difference is established."""
    compared = [row for row in rows if row.incomparable is None]
    means = [mean for row in compared if (mean := row.cells[column.name].mean) is not None]
    if len(set(means)) < 2:
        return None
    return max(means) if column.higher_is_better else min(means)


def plain_cell(text: str, sort: float | int | None, *, hint: str = "", is_missing: bool = False) -> dict[str, Any]:
    """A cell without a mark; `sort` is what its column is sorted by."""
    return {"text": text, "sort": sort, "hint": hint, "missing": is_missing, "best": False, "mark": None}


def _seeds_cell(row: SettingRow) -> dict[str, Any]:
    text = str(row.trials) if row.trials_completed == row.trials else f"{row.trials_completed} of {row.trials}"
    return plain_cell(
        text, row.trials_completed, hint=", ".join(f"{count} {name}" for name, count in row.statuses.items())
    )


def metric_cell(cell: Cell, scale: Scale, *, is_best: bool) -> dict[str, Any]:
    """Mean and interval over seeds, or the points, with their mark on the scale of the column."""
    if cell.mean is None:
        return plain_cell("-", None, hint=clean(cell.missing or ""), is_missing=True)
    interval = cell.interval
    points = ", ".join(number_text(point.value) for point in cell.points)
    return {
        **plain_cell(cell_text(cell), cell.mean, hint=f"{len(cell.points)} seeds: {points}"),
        "best": is_best,
        "mark": {
            "low": None if interval is None else scale.place(max(interval.low, scale.low)),
            "high": None if interval is None else scale.place(min(interval.high, scale.high)),
            "points": [scale.place(cell.mean)] if interval else [scale.place(point.value) for point in cell.points],
        },
    }


def _cost_cell(row: SettingRow, key: str, write: Any) -> dict[str, Any]:
    value = cost_value(row, key)
    if value is None:
        return plain_cell(write(value), None, hint=clean(row.why_no_cost(key)), is_missing=True)
    return plain_cell(write(value), value, hint=_of_runs(row) if is_time(key) else "")


def _of_runs(row: SettingRow) -> str:
    return f"median over {row.runs_alone} run{'' if row.runs_alone == 1 else 's'} made alone"


def _legend(table: SettingsTable) -> str:
    parts = ["Mean ± half of the 95 % t interval over seeds; with fewer than three seeds the points."]
    if any(row.is_base for row in table.rows):
        parts.append("The untouched base comes first.")
    return " ".join(parts)


def _notes(table: SettingsTable, alone: Sequence[str]) -> list[str]:
    notes = [f"Not in a mean: {clean(reason)}" for row in table.rows for reason in row.reasons]
    empty = empty_columns(table, [(key, title) for key, title, _ in COSTS[1:]])
    notes += [*(clean(f"{line[0].upper()}{line[1:]}.") for line in empty), *map(clean, alone)]
    return [*stopped_notes(table), *notes, *(f"Cannot be read: {clean(problem)}" for problem in table.problems)]


def settings_data(table: SettingsTable, records: Sequence[RunRecord], folders: Mapping[str, str]) -> dict[str, Any]:
    """What the page of one setting shows: its runs with their scores, its means, and its values of the axes."""
    by_setting: dict[str, list[RunRecord]] = {}
    for record in records:
        by_setting.setdefault(str(record.setting), []).append(record)
    titles = [clean(column.name) for column in table.columns]
    return {
        setting_id(row): {
            "name": clean(row.name),
            "titles": [*titles, *(title for _, title, _ in COSTS)],
            "runs": [
                {
                    "id": record.run_id,
                    "name": clean(record.name),
                    "state": str(record.state),
                    "folder": folders[record.run_id],
                    "values": _run_values(record, table.columns),
                    "missing": _run_reasons(record, table.columns),
                }
                for record in by_setting.get(row.setting, [])
            ],
            "means": [[title, cell_text(row.cells[c.name])] for title, c in zip(titles, table.columns, strict=True)],
            "axes": [[clean(key), clean(value_text(value))] for key, value in row.axes.items()],
            "notes": [clean(reason) for reason in [*row.reasons, *_absent(row)]],
        }
        for row in table.rows
    }


def _absent(row: SettingRow) -> list[str]:
    """Costs that the setting has not, and why."""
    return [f"No {title}: {row.why_no_cost(key)}." for key, title, _ in COSTS if cost_value(row, key) is None]


def _run_reasons(record: RunRecord, columns: Sequence[MetricColumn]) -> list[str]:
    """Why a value is absent where it is, in the order of `_run_values`."""
    names = [*(column.name for column in columns), *(key for key, _, _ in COSTS)]
    return [clean(why_missing(record.result, name)) for name in names]


def _run_values(record: RunRecord, columns: Sequence[MetricColumn]) -> list[str | None]:
    result = record.result
    if result is None:
        return [None] * (len(columns) + len(COSTS))
    scores = [result.metrics.get(column.name) for column in columns]
    costs = {"trainable_parameters": result.trainable_parameters, **result.measurements}
    return [
        *(None if score is None else number_text(score.value) for score in scores),
        *(None if costs.get(key) is None else write(costs[key]) for key, _, write in COSTS),
    ]
