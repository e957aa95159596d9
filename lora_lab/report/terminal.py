"""What commands print: the plan, the runs, the table of settings, a comparison. Digits for people; JSON stays raw."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console

from lora_lab.plan.row import PlanRow
from lora_lab.record.export import rows_of, to_json
from lora_lab.record.run_record import RunRecord
from lora_lab.report.cohort_words import alone_sentences, empty_columns, missing_of_runs
from lora_lab.report.grid import Column, Grid, console_for, print_grid, print_line
from lora_lab.report.text import (
    UNKNOWN,
    bytes_text,
    cell_text,
    count_text,
    interval_text,
    number_text,
    seconds_text,
    stopped_notes,
    value_text,
)
from lora_lab.study.compare import Comparison
from lora_lab.study.table import MetricColumn, SettingRow, SettingsTable

_FIRST_METRIC = "heldout/loss"
_PEAK, _TIME = "peak_allocated_bytes", "train_seconds"
_SHOWN_ALONE = 3
_COSTS = ((_PEAK, "peak memory"), (_TIME, "train time"))


def print_plan(rows: Sequence[PlanRow], *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """One line per job, how many of them would run, which train together, and why the others do not."""
    if as_json:
        _print_json([plan_json(row) for row in rows], stream)
        return
    console = console_for(stream)
    columns = (
        Column("run"),
        Column("fingerprint", is_optional=True),
        Column("state"),
        Column("cohort", is_optional=True),
        Column("steps", is_number=True),
        Column("trainable", is_number=True),
        Column("total", is_number=True, is_optional=True),
    )
    print_grid(console, Grid(columns, tuple(_plan_cells(row) for row in rows)))
    print_line(console, plan_counts(rows))
    _print_cohorts(console, rows)
    for reason in dict.fromkeys(f"{name}: {why}" for row in rows for name, why in row.missing.items()):
        print_line(console, f"not known: {reason}", style="dim")


def plan_counts(rows: Sequence[PlanRow]) -> str:
    """`3 trials: 1 new, 1 done, 1 duplicate`."""
    counts = {state: sum(row.state == state for row in rows) for state in ("new", "done", "duplicate")}
    return f"{len(rows)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def _plan_cells(row: PlanRow) -> tuple[str, ...]:
    name = row.name + (f" (repeat {row.repeat})" if row.repeat else "")
    numbers = (count_text(row.steps), count_text(row.trainable_parameters), count_text(row.total_parameters))
    cohort = "" if row.why_alone is None else "alone"
    if row.cohort is not None:
        cohort = f"{row.cohort} of {row.cohort_size}"
    return (name, row.fingerprint[:16], row.state, cohort, *numbers)


def _print_cohorts(console: Console, rows: Sequence[PlanRow]) -> None:
    sizes = {row.cohort: row.cohort_size for row in rows if row.cohort is not None}
    for cohort, size in sizes.items():
        print_line(console, f"{cohort}: {size} trials train together")
    alone: dict[str, list[str]] = {}
    for row in rows:
        if row.why_alone is not None:
            alone.setdefault(row.why_alone, []).append(row.name)
    for why, names in alone.items():
        more = f" and {len(names) - _SHOWN_ALONE} more" if len(names) > _SHOWN_ALONE else ""
        print_line(console, f"alone: {', '.join(names[:_SHOWN_ALONE])}{more}: {why}", style="dim")


def plan_json(row: PlanRow) -> dict[str, Any]:
    """A row of the plan as JSON values."""
    return {**asdict(row), "missing": dict(row.missing)}


def print_runs(records: Sequence[RunRecord], *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """The ledger's runs, damaged ones included."""
    if as_json:
        to_json(rows_of(records), sys.stdout if stream is None else stream)
        return
    console = console_for(stream)
    columns = (
        Column("id"),
        Column("name"),
        Column("status"),
        Column("attempt", is_number=True, is_optional=True),
        Column(_FIRST_METRIC, is_number=True),
        Column("peak memory", is_number=True, is_optional=True),
        Column("train time", is_number=True, is_optional=True),
        Column("tag", is_optional=True),
    )
    print_grid(console, Grid(columns, tuple(_run_cells(record) for record in records)))
    print_line(console, f"{len(records)} runs")
    for record in records:
        if (reason := _reason(record)) is not None:
            print_line(console, f"{record.run_id} {record.name}: {reason}", style="dim")
    for line in missing_of_runs(records, _COSTS):
        print_line(console, line, style="dim")


def _run_cells(record: RunRecord) -> tuple[str, ...]:
    result, header = record.result, record.header
    metric = None if result is None else result.metrics.get(_FIRST_METRIC)
    measured: dict[str, float | int] = {} if result is None else result.measurements
    return (
        record.run_id,
        record.name,
        str(record.state) + (f" ({record.owner})" if record.owner is not None else ""),
        str(record.attempts),
        UNKNOWN if metric is None else number_text(metric.value),
        bytes_text(measured.get(_PEAK)),
        seconds_text(measured.get(_TIME)),
        (header.tag if header is not None else None) or "",
    )


def _reason(record: RunRecord) -> str | None:
    if record.problem is not None:
        return record.problem
    return None if record.result is None else record.result.reason


def print_table(table: SettingsTable, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """The table of settings, what its signs mean, and every run that is not in a mean."""
    if as_json:
        _print_json(table.to_json(), stream)
        return
    console = console_for(stream)
    columns = (
        Column("setting"),
        Column("seeds", is_number=True),
        *(Column(_metric_title(column), is_number=True) for column in table.columns),
        Column("trainable", is_number=True),
        Column("peak memory", is_number=True),
        Column("train time", is_number=True),
    )
    print_grid(console, Grid(columns, tuple(_setting_cells(row, table.columns) for row in table.rows)))
    _print_legend(console, table)
    for line in _table_notes(table):
        print_line(console, line, style="dim")


def _metric_title(column: MetricColumn) -> str:
    return f"{column.name} {'↑' if column.higher_is_better else '↓'}"


def _setting_cells(row: SettingRow, columns: Sequence[MetricColumn]) -> tuple[str, ...]:
    return (
        row.name,
        str(row.trials) if row.trials_completed == row.trials else f"{row.trials_completed} of {row.trials}",
        *(cell_text(row.cells[column.name]) for column in columns),
        count_text(row.trainable_parameters),
        bytes_text(row.cost.get(_PEAK)),
        seconds_text(row.cost.get(_TIME)),
    )


def _print_legend(console: Console, table: SettingsTable) -> None:
    cells = [cell for row in table.rows for cell in row.cells.values()]
    parts = []
    if any(cell.interval is not None for cell in cells):
        parts.append("mean ± 95 % t interval over seeds")
    if any(cell.points and cell.interval is None for cell in cells):
        parts.append("fewer than 3 seeds: the points")
    if table.columns:
        parts.append("↑ higher, ↓ lower is better")
        chance = [f"{c.name} {number_text(c.chance)}" for c in table.columns if c.chance is not None]
        parts += [f"chance: {', '.join(chance)}"] if chance else []
    if parts:
        print_line(console, "; ".join(parts), style="dim")


def _table_notes(table: SettingsTable) -> list[str]:
    notes = stopped_notes(table)
    notes += [f"not in a mean: {reason}" for row in table.rows for reason in row.reasons]
    for row in table.rows:
        for name, cell in row.cells.items():
            is_idle = row.is_base and name.startswith("train/")  # nothing is trained, so nothing is missed
            if cell.missing is not None and row.completed and not is_idle:
                notes.append(f"{row.name}: no {name}: {cell.missing}")
    notes += [*empty_columns(table, _COSTS), *alone_sentences(table.not_alone)]
    return [*notes, *(f"cannot be read: {problem}" for problem in table.problems)]


def print_comparison(comparison: Comparison, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """What was set differently, both scores, and the paired differences."""
    if as_json:
        _print_json(comparison.to_json(), stream)
        return
    console = console_for(stream)
    for side, record in (("a", comparison.a), ("b", comparison.b)):
        print_line(console, f"{side}: {record.run_id} {record.name} {record.state}", style="bold")
    for note in comparison.notes:
        print_line(console, f"note: {note}", style="yellow")
    rows = tuple((key, value_text(a), value_text(b)) for key, (a, b) in comparison.configuration.items())
    if rows:
        print_grid(console, Grid((Column("key"), Column("a"), Column("b")), rows))
    else:
        print_line(console, "the configurations are equal")
    _print_metrics(console, comparison)
    _print_paired(console, comparison)
    for name, reason in comparison.missing.items():
        print_line(console, f"no {name}: {reason}", style="dim")


def _print_metrics(console: Console, comparison: Comparison) -> None:
    if not comparison.metrics:
        return
    titles = ("metric", "a", "b", "b - a", "better")
    columns = tuple(Column(title, is_number=title in ("a", "b", "b - a")) for title in titles)
    rows = tuple(
        (m.name, number_text(m.a), number_text(m.b), _signed(m.difference), m.better or "equal")
        for m in comparison.metrics
    )
    print_line(console, "")
    print_grid(console, Grid(columns, rows))


def _print_paired(console: Console, comparison: Comparison) -> None:
    if not comparison.paired:
        return
    columns = (
        Column("paired, per example"),
        Column("n", is_number=True),
        Column("b - a (95 %)", is_number=True),
        Column("only a : only b", is_number=True),
        Column("McNemar p", is_number=True),
    )
    rows = tuple(
        (
            paired.name,
            count_text(paired.interval.n),
            interval_text(paired.interval.mean, paired.interval.half_width),
            UNKNOWN if paired.p is None else f"{paired.only_a} : {paired.only_b}",
            UNKNOWN if paired.p is None else number_text(paired.p),
        )
        for paired in comparison.paired
    )
    print_line(console, "")
    print_grid(console, Grid(columns, rows))


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number_text(value)


def _print_json(value: object, stream: TextIO | None) -> None:
    target = sys.stdout if stream is None else stream
    json.dump(value, target, indent=2, allow_nan=False, ensure_ascii=False)
    target.write("\n")
