"""Contenders ranked by score, memory and time: each at the best of the learning rates that it was given.

Settings that differ in nothing but the learning rate are one contender, and the rate with the best mean over seeds
stands for it; where no rate is swept every setting is a contender. A best rate at the edge of its grid may not be the
best there is. The best rate is picked on the very runs that are shown, so small leads are flattered.

Whether a contender can be told apart from the first is the paired comparison of `answer`, corrected for every setting
that has a score and not for the contenders alone: the rates that lost had the same chance to come out first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.answer import Against, against_other
from lora_lab.study.cells import Cell, Point, cell_of
from lora_lab.study.cost import CompletedRun, comparable_runs, machines_of, timed_runs
from lora_lab.study.settings import setting_values, unique_names
from lora_lab.study.table import MetricColumn, SettingRow, SettingsTable, seed_of

_RATE = "learning_rate"
_MEMORY = "peak_allocated_bytes"
_TIME = "train_seconds"
# How a ranked contender stands to the first. open: it cannot be told apart; ahead: better on the seeds in common though
# not in its mean, which covers other seeds too; not_compared: fewer than three seeds in common.
Stand = Literal["first", "behind", "open", "ahead", "not_compared"]
_NO_WHOLE_RATE = "runs of every rate that has a score were stopped early"
_STANDS: dict[str, Stand] = {"better": "behind", "open": "open", "worse": "ahead"}


@dataclass(frozen=True, slots=True)
class Contender:
    """One contender, by the setting that stands for it (fingerprint `setting`).

    rate, rates: its learning rate and all that were tried, ascending; `is_at_edge`: several were, and the best is the
    smallest or the largest. `completed` of `runs` ended with scores. A rank is 1 + the number of contenders that are
    better, so equal ones share it; None where there is nothing to rank, `unranked` says why for the score. `memory`:
    smallest and largest peak over its runs, bytes; the largest is ranked. `time`: training seconds of the runs that
    count.
    """

    name: str
    setting: str
    is_base: bool
    rate: float | None
    rates: tuple[float, ...]
    is_at_edge: bool
    completed: int
    runs: int
    score: Cell
    score_rank: int | None
    unranked: str | None
    stand: Stand | None
    against_first: Against | None
    memory: tuple[int, int] | None
    memory_rank: int | None
    memory_missing: str | None
    time: Cell
    time_rank: int | None
    trainable_parameters: int | None

    def to_json(self) -> dict[str, Any]:
        """All fields; the comparison as `Against` has it, with the first's score minus this one's."""
        against = self.against_first
        return {
            **asdict(self),
            "rates": list(self.rates),
            "score": self.score.to_json(),
            "against_first": None if against is None else against.to_json(),
            "memory": None if self.memory is None else list(self.memory),
            "time": self.time.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Ranking:
    """`contenders`: by score rank, then those without one, untouched bases last. `comparisons`: what `against_first` is
    corrected for. `machines`: how many machines the times come from; of several, times are not ranked."""

    metric: MetricColumn | None
    contenders: tuple[Contender, ...]
    comparisons: int
    machines: int

    @property
    def sweeps_rates(self) -> bool:
        """Whether any contender was given more than one learning rate."""
        return any(len(one.rates) > 1 for one in self.contenders)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "metric": None if self.metric is None else asdict(self.metric),
            "comparisons": self.comparisons,
            "machines": self.machines,
            "sweeps_rates": self.sweeps_rates,
            "contenders": [one.to_json() for one in self.contenders],
        }


@dataclass(frozen=True, slots=True)
class _Group:
    """Settings that differ in the learning rate alone, each with its rate (None for an untouched base).

    `shown`: the setting that stands for them, or the first of them where `unranked` says why none can.
    """

    rows: tuple[tuple[SettingRow, float | None], ...]
    shown: SettingRow
    unranked: str | None


def ranking_of(records: Sequence[RunRecord], table: SettingsTable) -> Ranking:
    """The contenders among the settings of a table that was made of these runs, ranked by its first metric."""
    runs: dict[str, list[RunRecord]] = {}
    for record in records:
        runs.setdefault(str(record.setting), []).append(record)
    column = table.columns[0] if table.columns else None
    groups = _groups(table, runs, column)
    shown = [runs[group.shown.setting] for group in groups]
    values = [_without_rate(of_one[0]) for of_one in shown]
    names = unique_names([of_one[0].name for of_one in shown], values, [group.shown.setting for group in groups])
    completed = [_completed(of_one) for of_one in shown]
    found = [_contender(*one, column) for one in zip(groups, names, completed, strict=True)]
    machines = _machines(found, completed)
    found = _ranked_by_cost(found, with_times=len(machines) <= 1)
    comparisons = 0
    if column is not None:
        comparisons = _comparisons(table, column)
        found = _ranked_by_score(found, {row.setting: row for row in table.rows}, column, comparisons)
    return Ranking(column, tuple(found), comparisons, len(machines))


def _groups(table: SettingsTable, runs: Mapping[str, Sequence[RunRecord]], column: MetricColumn | None) -> list[_Group]:
    """In the order of the table."""
    members: dict[str, list[tuple[SettingRow, float | None]]] = {}
    for row in table.rows:
        record = runs[row.setting][0]
        identities = {} if record.header is None else record.header.identities
        key = json.dumps([_without_rate(record), identities], sort_keys=True)
        members.setdefault(key, []).append((row, setting_values(record.trial).get(_RATE)))
    return [_group(tuple(rows), column) for rows in members.values()]


def _without_rate(record: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in setting_values(record.trial).items() if key != _RATE}


def _group(rows: tuple[tuple[SettingRow, float | None], ...], column: MetricColumn | None) -> _Group:
    """Picks the best rate: among those of which no run diverged or was stopped early and that have the most seeds, the
    best mean.

    A rate that lost a seed could win by losing the worst. Where only one was given there is nothing to pick, but one
    with stopped runs stands for nothing either: its mean is compared with no other.
    """
    settings = [row for row, _ in rows]
    scored = [] if column is None else [row for row in settings if row.cells[column.name].points]
    if column is None or not scored:
        return _Group(rows, settings[0], "no score")
    whole = [row for row in scored if row.incomparable is None]
    if not whole:
        return _Group(rows, settings[0], scored[0].incomparable if len(rows) == 1 else _NO_WHOLE_RATE)
    steady = [row for row in whole if not row.statuses.get(Status.DIVERGED.value)] if len(rows) > 1 else whole
    if not steady:
        return _Group(rows, settings[0], "no rate without a diverged run has a score")
    most = max(len(row.cells[column.name].points) for row in steady)
    full = [row for row in steady if len(row.cells[column.name].points) == most]
    return _Group(rows, min(full, key=lambda row: _loss(row.cells[column.name], column)), None)


def _loss(cell: Cell, column: MetricColumn) -> float:
    """The mean, turned so that less is better."""
    assert cell.mean is not None  # asked only of cells with points
    return -cell.mean if column.higher_is_better else cell.mean


def _completed(records: Iterable[RunRecord]) -> list[CompletedRun]:
    return [(record, record.result) for record in records if record.result and record.state == Status.COMPLETED]


def _contender(group: _Group, name: str, completed: Sequence[CompletedRun], column: MetricColumn | None) -> Contender:
    """All but the ranks. Where no setting can stand for the contender it has neither score nor costs."""
    row = group.shown
    rates = sorted({rate for _, rate in group.rows if rate is not None})
    is_shown = group.unranked is None or len(group.rows) == 1
    rate = {one.setting: rate for one, rate in group.rows}[row.setting] if group.unranked is None else None
    why = group.unranked or "no score"
    measured, _ = comparable_runs(completed, _MEMORY)
    memory = [int(result.measurements[_MEMORY]) for _, result in measured if _MEMORY in result.measurements]
    return Contender(
        name=name,
        setting=row.setting,
        is_base=row.is_base,
        rate=rate,
        rates=tuple(rates),
        is_at_edge=len(rates) > 1 and rate in (rates[0], rates[-1]),
        completed=row.completed,
        runs=row.runs,
        score=row.cells[column.name] if column is not None and is_shown else cell_of([], why),
        score_rank=None,
        unranked="untouched base" if row.is_base else group.unranked,
        stand=None,
        against_first=None,
        memory=(min(memory), max(memory)) if memory and is_shown else None,
        memory_rank=None,
        memory_missing=None
        if memory and is_shown
        else row.missing.get(_MEMORY, why if not is_shown else "not measured"),
        time=_time(completed, row) if is_shown else cell_of([], why),
        time_rank=None,
        trainable_parameters=row.trainable_parameters,
    )


def _time(completed: Sequence[CompletedRun], row: SettingRow) -> Cell:
    """Over runs, not seeds: a trial that was measured several times counts as often."""
    timed, why = timed_runs(completed) if completed else ([], "no completed run")
    values = [(record, result.measurements[_TIME]) for record, result in timed if _TIME in result.measurements]
    points = [Point(record.run_id, seed_of(record), float(value), None) for record, value in values]
    return cell_of(points, why or row.missing.get(_TIME, "not measured"))


def _machines(found: Sequence[Contender], completed: Sequence[Sequence[CompletedRun]]) -> set[str | None]:
    """Where the times that are shown were measured."""
    shown = [runs for one, runs in zip(found, completed, strict=True) if one.time.points]
    return machines_of(run for runs in shown for run in timed_runs(runs)[0])


def _comparisons(table: SettingsTable, column: MetricColumn) -> int:
    """As many as `answer` makes: of one setting with all others that have a score, and with the base if it has one."""
    scored = [row for row in table.rows if row.cells[column.name].points and row.incomparable is None]
    return sum(not row.is_base for row in scored) - 1 + any(row.is_base for row in scored)


def _rank(value: float, values: Sequence[float]) -> int:
    return 1 + sum(other < value for other in values)


def _ranked_by_cost(found: Sequence[Contender], *, with_times: bool) -> list[Contender]:
    trained = [one for one in found if not one.is_base]
    peaks = [one.memory[1] for one in trained if one.memory is not None]
    times = [one.time.mean for one in trained if one.time.mean is not None and with_times]
    return [
        one
        if one.is_base
        else replace(
            one,
            memory_rank=None if one.memory is None else _rank(one.memory[1], peaks),
            time_rank=None if one.time.mean is None or not with_times else _rank(one.time.mean, times),
        )
        for one in found
    ]


def _ranked_by_score(
    found: Sequence[Contender], rows: Mapping[str, SettingRow], column: MetricColumn, comparisons: int
) -> list[Contender]:
    """Sorted and ranked. As in `answer`, one with fewer than three seeds has no rank where others have three."""
    able = [one for one in found if one.unranked is None]
    ready = [one for one in able if one.score.interval is not None]
    ranked = sorted(ready or able, key=lambda one: _loss(one.score, column))
    losses = [_loss(one.score, column) for one in ranked]
    placed = [
        replace(
            one,
            score_rank=_rank(loss, losses),
            **_stand(rows[ranked[0].setting], rows[one.setting], column, comparisons),
        )
        for one, loss in zip(ranked, losses, strict=True)
    ]
    kept = {one.setting for one in ranked}
    left = [one for one in found if one.setting not in kept]
    few = [replace(one, unranked="fewer than 3 seeds") if one.unranked is None else one for one in left]
    return [*placed, *sorted(few, key=lambda one: one.is_base)]


def _stand(first: SettingRow, other: SettingRow, column: MetricColumn, comparisons: int) -> dict[str, Any]:
    if first is other:
        return {"stand": "first", "against_first": None}
    against = against_other(first, other, column, comparisons)
    return {"stand": "not_compared" if against is None else _STANDS[against.verdict], "against_first": against}
