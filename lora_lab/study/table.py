"""The table of a study: one row per setting, averaged over seeds, with everything that could not be averaged counted.

Only completed runs enter a mean. A diverged, stopped or failed run is shown by its count and reason. Scores count
whichever way a run was executed, and those of a trial that was measured several times (`repeat`) once, since they are
the same; of its times all count that were measured alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.record.cohort_facts import is_alone
from lora_lab.record.result import Metric, Result, Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.alone import NotAlone, not_alone
from lora_lab.study.cells import Cell, Point, cell_of
from lora_lab.study.cost import cost_of
from lora_lab.study.settings import is_base, setting_values, unique_names, varying_keys


@dataclass(frozen=True, slots=True)
class MetricColumn:
    """What a metric measures, and which way is better."""

    name: str
    unit: str
    higher_is_better: bool
    chance: float | None


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting. `axes`: its values of the keys that vary in the table. `trials`, `trials_completed`: how many trials
    its runs are of, repeats of one counting once. `runs_alone`: completed runs that were executed alone; `last_repeat`:
    the largest number of a repeat that completed. `cost`: bytes (the largest over runs) and seconds (the median over
    runs executed alone), see `cost.py`; `missing` says why a cost is absent."""

    name: str
    setting: str
    is_base: bool
    axes: dict[str, Any]
    statuses: dict[str, int]
    trials: int
    trials_completed: int
    runs_alone: int
    last_repeat: int
    reasons: tuple[str, ...]
    trainable_parameters: int | None
    total_parameters: int | None
    predicted_peak_allocated_bytes: int | None
    cells: dict[str, Cell]
    cost: dict[str, float | int]
    missing: dict[str, str]

    @property
    def runs(self) -> int:
        """How many runs the setting has in the table, whatever became of them."""
        return sum(self.statuses.values())

    @property
    def completed(self) -> int:
        """How many of them ended with scores."""
        return self.statuses.get(Status.COMPLETED.value, 0)

    def why_no_cost(self, name: str) -> str:
        """Why a cost of that name (`trainable_parameters` is one too) is absent."""
        if not self.completed:
            return "no completed run"
        return self.missing.get(name, "nothing is trained" if self.is_base else "not measured")

    @property
    def stopped(self) -> int:
        """How many of them the rule of a search has stopped early."""
        return self.statuses.get(Status.STOPPED.value, 0)

    @property
    def incomparable(self) -> str | None:
        """Why its scores are compared with no other setting's; None where they may be.

        A rule ends the runs with the worse scores, so the mean of those it has left flatters the setting.
        """
        if not self.stopped:
            return None
        return f"{self.stopped} of {self.runs} runs {'was' if self.stopped == 1 else 'were'} stopped early"

    def to_json(self) -> dict[str, Any]:
        """All fields, metrics by name."""
        return {
            "name": self.name,
            "setting": self.setting,
            "is_base": self.is_base,
            "axes": self.axes,
            "runs": self.runs,
            "completed": self.completed,
            "trials": self.trials,
            "trials_completed": self.trials_completed,
            "runs_alone": self.runs_alone,
            "statuses": self.statuses,
            "reasons": list(self.reasons),
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "predicted_peak_allocated_bytes": self.predicted_peak_allocated_bytes,
            "metrics": {name: cell.to_json() for name, cell in self.cells.items()},
            "measurements": self.cost,
            "missing": self.missing,
        }


@dataclass(frozen=True, slots=True)
class SettingsTable:
    """Rows in order: untouched bases first. `problems`: runs that could not be read at all."""

    columns: tuple[MetricColumn, ...]
    rows: tuple[SettingRow, ...]
    numerics_version: int | None
    problems: tuple[str, ...]

    @property
    def not_alone(self) -> tuple[NotAlone, ...]:
        """For time and memory, the settings that have none to compare since none of their runs was made alone."""
        return not_alone(self.rows)

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values."""
        return {
            "numerics_version": self.numerics_version,
            "metrics": [
                {"name": c.name, "unit": c.unit, "higher_is_better": c.higher_is_better, "chance": c.chance}
                for c in self.columns
            ],
            "rows": [row.to_json() for row in self.rows],
            "not_alone": [one.to_json() for one in self.not_alone],
            "problems": list(self.problems),
        }


def settings_table(records: Iterable[RunRecord], *, metrics: Sequence[str] | None) -> SettingsTable:
    """The table of the given runs.

    `metrics` are the columns, in order; None takes every metric that a completed run has.

    Raises:
        InputError: the runs used different numerics versions, a metric means different things in them, or no run knows
            a metric that was asked for.
    """
    every = list(records)
    readable = [record for record in every if record.header is not None]
    version = _one_numerics_version(readable)
    columns = _columns(readable, metrics)
    groups: dict[str, list[RunRecord]] = {}
    for record in readable:
        groups.setdefault(str(record.setting), []).append(record)
    values = [setting_values(group[0].trial) for group in groups.values()]
    names = unique_names([group[0].name for group in groups.values()], values, list(groups))
    varying = varying_keys(values)
    rows = [
        _row(group, name=name, axes={key: value[key] for key in varying if key in value}, columns=columns)
        for group, name, value in zip(groups.values(), names, values, strict=True)
    ]
    rows.sort(key=lambda row: not row.is_base)
    problems = tuple(str(record.problem) for record in every if record.problem is not None)
    return SettingsTable(columns, tuple(rows), version, problems)


def _one_numerics_version(records: Sequence[RunRecord]) -> int | None:
    versions = sorted({record.result.numerics_version for record in records if record.result is not None})
    if len(versions) > 1:
        listed = " and ".join(map(str, versions))
        rule = (
            f"these runs were made by numerics versions {listed}, whose scores cannot be compared; run the older again"
        )
        raise InputError(Problem("numerics_version", rule))
    return versions[0] if versions else None


def _completed(records: Iterable[RunRecord]) -> list[tuple[RunRecord, Result]]:
    return [(record, record.result) for record in records if record.result and record.state == Status.COMPLETED]


def _columns(records: Sequence[RunRecord], asked: Sequence[str] | None) -> tuple[MetricColumn, ...]:
    found: dict[str, MetricColumn] = {}
    for _, result in _completed(records):
        for name, metric in result.metrics.items():
            column = _column(name, metric)
            if found.setdefault(name, column) != column:
                raise InputError(Problem(name, f"means different things in these runs: {found[name]} and {column}"))
    if asked is None:
        return tuple(found.values())
    excused = {name for record in records if record.result is not None for name in record.result.missing}
    unknown = [name for name in asked if name not in found and name not in excused] if found else []
    if unknown:
        raise InputError([Problem("metrics", f'no run has "{name}"' + nearest(name, list(found))) for name in unknown])
    return tuple(found[name] for name in asked if name in found)


def _column(name: str, metric: Metric) -> MetricColumn:
    return MetricColumn(name, metric.unit, metric.higher_is_better, metric.chance)


def _row(
    records: Sequence[RunRecord], *, name: str, axes: dict[str, Any], columns: Sequence[MetricColumn]
) -> SettingRow:
    completed = _completed(records)
    results = [record.result for record in records if record.result is not None]
    cost, missing = cost_of(completed)
    return SettingRow(
        name=name,
        setting=str(records[0].setting),
        is_base=is_base(records[0].trial),
        axes=axes,
        statuses=dict(Counter(str(record.state) for record in records)),
        trials=len({record.header.fingerprint for record in records if record.header is not None}),
        trials_completed=len({result.fingerprint for _, result in completed}),
        runs_alone=sum(is_alone(result) for _, result in completed),
        last_repeat=max((result.repeat for _, result in completed), default=0),
        reasons=tuple(f"{record.name}: {reason}" for record in records if (reason := _reason(record))),
        trainable_parameters=_common([result.trainable_parameters for result in results]),
        total_parameters=_common([result.total_parameters for result in results]),
        predicted_peak_allocated_bytes=_common([result.predicted_peak_allocated_bytes for result in results]),
        cells={column.name: _cell(column.name, completed) for column in columns},
        cost=cost,
        missing=missing,
    )


def _reason(record: RunRecord) -> str | None:
    """Why a run did not complete, in one line."""
    if record.state == Status.COMPLETED:
        return None
    reason = record.problem or (record.result.reason if record.result is not None else None)
    return str(record.state) + (f": {reason.splitlines()[0]}" if reason else "")


def _common(values: Sequence[int | None]) -> int | None:
    """The largest known; trials of one setting have the same."""
    known = [value for value in values if value is not None]
    return max(known, default=None)


def _cell(name: str, completed: Sequence[tuple[RunRecord, Result]]) -> Cell:
    points: dict[str, Point] = {}  # by fingerprint: repeats of a trial have the same score
    reasons: list[str] = []
    for record, result in completed:
        metric = result.metrics.get(name)
        if metric is not None:
            point = Point(record.run_id, seed_of(record), metric.value, metric.standard_error)
            points.setdefault(result.fingerprint, point)
        elif name in result.missing:
            reasons.append(result.missing[name])
    why = "no completed run" if not completed else "; ".join(dict.fromkeys(reasons)) or "not measured"
    return cell_of(list(points.values()), why)


def seed_of(record: RunRecord) -> int | None:
    """The trial's seed; None for an untouched base, whose scores do not depend on it."""
    return None if is_base(record.trial) else record.trial["seed"]
