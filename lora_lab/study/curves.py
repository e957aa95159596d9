"""Learning curves from the step logs: of one run, and of a setting as the mean over seeds with its band.

A long run is thinned (`series.py`). A run that was trained in a cohort has no speed of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_lab.errors import LabError
from lora_lab.record.cohort_facts import is_together
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import read_steps
from lora_lab.study.interval import t_quantile
from lora_lab.study.series import SPEED, Series, series_of
from lora_lab.study.settings import is_base
from lora_lab.study.table import SettingRow

Band = Literal["interval", "range"]
Array = NDArray[np.float64]

_SEEDS_FOR_INTERVAL = 3
_DRAWN = (Status.COMPLETED, Status.DIVERGED, Status.STOPPED, "RUNNING")
_NO_OWN_SPEED = "runs trained in cohorts: no speed of their own"


@dataclass(frozen=True, slots=True)
class RunCurve:
    """One run's curves by key of the step log; a key without any value is not there. `missing`: why there is no log."""

    run_id: str
    name: str
    state: str
    series: dict[str, Series]
    missing: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "run_id": self.run_id,
            "name": self.name,
            "state": self.state,
            "series": {key: series.to_json() for key, series in self.series.items()},
            "missing": self.missing,
        }


@dataclass(frozen=True, slots=True)
class SettingCurve:
    """A setting's mean over its completed seeds, at the steps that all of them have; empty where none completed.

    `band`: what `low` and `high` are: the 95 % t `interval` from three seeds on, the `range` of two, None (and no ends)
    below. `runs` has every curve, those of diverged, stopped and running runs included.
    """

    setting: str
    name: str
    key: str
    seeds: int
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    band: Band | None
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    runs: tuple[RunCurve, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "setting": self.setting,
            "name": self.name,
            "key": self.key,
            "seeds": self.seeds,
            "steps": list(self.steps),
            "mean": list(self.mean),
            "band": self.band,
            "low": None if self.low is None else list(self.low),
            "high": None if self.high is None else list(self.high),
            "runs": [run.to_json() for run in self.runs],
        }


def run_curves(record: RunRecord, keys: Sequence[str], points: int = 300, *, suffix: str | None = None) -> RunCurve:
    """The curves of one run, whatever became of it, each of at most `points` points.

    `keys` are those of the step log, and `tokens_per_second`; with `suffix` also all other names of its first and last
    step that end so. Nothing is raised for a log that is damaged or not there.
    """
    lines, missing = _lines_of(record)
    width = _bin_width(lines, points)
    if suffix is not None and lines:
        ends = dict.fromkeys(name for step in (min(lines), max(lines)) for name in lines[step])
        keys = [*keys, *(name for name in ends if name.endswith(suffix) and name not in keys)]
    return _run_curve(record, lines, missing, keys, width)


def setting_curves(
    records: Iterable[RunRecord], rows: Sequence[SettingRow], key: str, points: int = 200
) -> tuple[list[SettingCurve], list[str]]:
    """The curves of these settings, in their order, and why runs have none. Settings without any curve are left out.

    Completed, diverged, stopped and running runs are drawn. Only completed ones enter a mean, a repeated trial once.
    """
    by_setting: dict[str, list[RunRecord]] = {row.setting: [] for row in rows if not row.is_base}
    reasons: list[str] = []
    for record in records:
        if record.setting not in by_setting:
            continue
        if record.state in _DRAWN:
            by_setting[record.setting].append(record)
        else:
            reasons.append(f"{record.name}: {record.state}")
    curves = []
    for row in rows:
        drawn, missing = _drawn(by_setting.get(row.setting, []), key, points)
        reasons += missing
        if drawn:
            curves.append(_setting_curve(row, drawn, key))
    return curves, reasons


def _drawn(records: Sequence[RunRecord], key: str, points: int) -> tuple[list[tuple[RunRecord, RunCurve]], list[str]]:
    """The runs of a setting that have a curve, all in the same bins, and why others have none."""
    read = [(record, *_lines_of(record)) for record in records]
    width = max((_bin_width(lines, points) for _, lines, _ in read), default=1)
    drawn: list[tuple[RunRecord, RunCurve]] = []
    reasons: list[str] = []
    for record, lines, missing in read:
        curve = _run_curve(record, lines, missing, (key,), width)
        if key == SPEED and _shares_time(record, lines):
            reasons.append(_NO_OWN_SPEED)
        elif curve.series:
            drawn.append((record, curve))
        else:
            reasons.append(f"{record.name}: {curve.missing or f'no {key} in its step log'}")
    return drawn, reasons


def _shares_time(record: RunRecord, lines: Mapping[int, Mapping[str, Any]]) -> bool:
    """In a cohort steps have no seconds of their own; a run that went on alone has some, which are not all of it."""
    is_member = record.result is not None and is_together(record.result)
    return is_member or (bool(lines) and not any("seconds" in line for line in lines.values()))


def _lines_of(record: RunRecord) -> tuple[dict[int, Mapping[str, Any]], str | None]:
    """The log's lines by step, ascending (of a step that was taken twice the later), and why there are none."""
    try:
        logged = read_steps(record.steps_path)
    except LabError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}, _why_no_log(record)
        return {}, str(error)
    lines: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(logged, start=1):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            return {}, f"{record.steps_path}:{number}: expected a step, got {str(step)[:50]}"
        lines[step] = line
    return dict(sorted(lines.items())), None if lines else _why_no_log(record)


def _why_no_log(record: RunRecord) -> str:
    if record.header is not None and is_base(record.trial):
        return "nothing is trained"
    return "no step has ended yet" if record.state == "RUNNING" else "no step was logged"


def _bin_width(lines: Mapping[int, Mapping[str, Any]], points: int) -> int:
    return math.ceil(max(lines, default=1) / points)


def _run_curve(
    record: RunRecord,
    lines: Mapping[int, Mapping[str, Any]],
    missing: str | None,
    keys: Sequence[str],
    width: int,
) -> RunCurve:
    found = {key: series_of(lines, key, width) for key in keys}
    series = {key: one for key, one in found.items() if one.steps or one.ended}
    return RunCurve(record.run_id, record.name, str(record.state), series, missing)


def _setting_curve(row: SettingRow, drawn: Sequence[tuple[RunRecord, RunCurve]], key: str) -> SettingCurve:
    completed: dict[str, Series] = {}  # by fingerprint: repeats of a trial have the same curve
    for record, curve in drawn:
        if record.state == Status.COMPLETED and record.header is not None:
            completed.setdefault(record.header.fingerprint, curve.series[key])
    by_step = [dict(zip(series.steps, series.values, strict=True)) for series in completed.values()]
    shared = sorted(set.intersection(*(set(values) for values in by_step))) if by_step else []
    columns = np.array([[values[step] for step in shared] for values in by_step], dtype=np.float64)
    mean, band, low, high = _banded(columns.reshape(len(by_step), len(shared)))
    finite = np.isfinite(mean) & np.isfinite(low) & np.isfinite(high)  # huge numbers may have no spread
    return SettingCurve(
        setting=row.setting,
        name=row.name,
        key=key,
        seeds=len(by_step),
        steps=tuple(np.array(shared, dtype=np.int64)[finite].tolist()),
        mean=tuple(mean[finite].tolist()),
        band=band,
        low=None if band is None else tuple(low[finite].tolist()),
        high=None if band is None else tuple(high[finite].tolist()),
        runs=tuple(curve for _, curve in drawn),
    )


def _banded(values: Array) -> tuple[Array, Band | None, Array, Array]:
    """Mean over seeds (rows) at each step, the kind of band, and its ends."""
    seeds = len(values)
    if seeds == 0:
        nothing = np.zeros(0)
        return nothing, None, nothing, nothing
    with np.errstate(over="ignore", invalid="ignore"):
        mean: Array = values.mean(axis=0)
        if seeds < _SEEDS_FOR_INTERVAL:
            return mean, "range" if seeds > 1 else None, values.min(axis=0), values.max(axis=0)
        half = t_quantile(seeds - 1) * values.std(axis=0, ddof=1) / math.sqrt(seeds)
        return mean, "interval", mean - half, mean + half
