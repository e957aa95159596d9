"""What the routers of mixtures did: during a training, on each task at evaluation, and settings side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import LabError
from lora_lab.record.atomic import read_json
from lora_lab.record.result import Status
from lora_lab.record.run_record import ROUTING_FILE, RunRecord
from lora_lab.schema.method import ROUTED_KINDS
from lora_lab.study.cells import Cell, Point, cell_of
from lora_lab.study.layers import by_layer, logged
from lora_lab.study.table import SettingsTable, seed_of

# What settings are compared by, and on which side of the training data.
MEASURES = ("relative_entropy", "top2_mass")
SIDES = ("trained", "untrained")


@dataclass(frozen=True, slots=True)
class RoutingInTraining:
    """Routers over the intervals of a training, each the tokens since the observation before.

    steps: of the observations, at most eight. relative_entropy: by kind of module at each step, mean over layers; None
    where no layer has two experts. layers, loads: at the last step, by kind the mean weight of every expert, one tuple
    per layer; None where a layer has no such router. `missing`: why there is nothing.
    """

    steps: tuple[int, ...]
    relative_entropy: dict[str, tuple[float | None, ...]]
    layers: tuple[int, ...]
    loads: dict[str, tuple[tuple[float, ...] | None, ...]]
    missing: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "steps": list(self.steps),
            "relative_entropy": {kind: list(values) for kind, values in self.relative_entropy.items()},
            "layers": list(self.layers),
            "loads": {
                kind: [None if one is None else list(one) for one in values] for kind, values in self.loads.items()
            },
            "missing": self.missing,
        }


@dataclass(frozen=True, slots=True)
class LabelRouting:
    """One task, or the held-out rows of one label. loads: by number of experts the mean weight of each expert over all
    routers with so many. relative_entropy, top2_mass: means over routers; None where none has two experts."""

    label: str
    source: str
    trained: bool
    sequences: int
    tokens: int
    loads: dict[int, tuple[float, ...]]
    relative_entropy: float | None
    top2_mass: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        loads = {str(experts): list(load) for experts, load in self.loads.items()}
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "loads": loads}


@dataclass(frozen=True, slots=True)
class Control:
    """How far routing follows the labels: variance between labels of the mean probabilities, beside the same with the
    labels shuffled over sequences."""

    labels: int
    statistic: float
    shuffled_mean: float
    shuffled_quantile_95: float
    p_value: float
    permutations: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class RoutingAtEvaluation:
    """labels: those that were trained on first. trained, all: the control over those and over all labels; None where
    there are fewer than two. `missing`: why there is nothing."""

    labels: tuple[LabelRouting, ...]
    trained: Control | None
    all: Control | None
    missing: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "labels": [one.to_json() for one in self.labels],
            "trained": None if self.trained is None else self.trained.to_json(),
            "all": None if self.all is None else self.all.to_json(),
            "missing": self.missing,
        }


@dataclass(frozen=True, slots=True)
class RoutingRow:
    """A setting with routers. cells: by (measure, side) over seeds, each run's value being the mean over the labels of
    that side. p_values: of the control over `trained` and over `all` labels, one per seed: they have no mean."""

    setting: str
    name: str
    cells: dict[tuple[str, str], Cell]
    p_values: dict[str, tuple[Point, ...]]

    def to_json(self) -> dict[str, Any]:
        """All fields; cells as `measure/side`."""
        return {
            "setting": self.setting,
            "name": self.name,
            "cells": {"/".join(key): cell.to_json() for key, cell in self.cells.items()},
            "p_values": {side: [point.to_json() for point in points] for side, points in self.p_values.items()},
        }


def has_routers(record: RunRecord) -> bool:
    """Whether the run's method mixes experts by a router."""
    return record.trial.get("method", {}).get("kind") in ROUTED_KINDS


def routing_in_training(record: RunRecord) -> RoutingInTraining:
    """The routers of a run, whatever became of it; nothing is raised for a log that is damaged or not there."""
    found, missing = logged(record, "routing", _routers)
    if not found:
        return RoutingInTraining((), {}, (), {}, missing)
    layers, last = by_layer(found[-1][1])
    observed = [by_layer(routers)[1] for _, routers in found]
    return RoutingInTraining(
        steps=tuple(step for step, _ in found),
        relative_entropy={kind: tuple(_entropy(one.get(kind, ())) for one in observed) for kind in last},
        layers=layers,
        loads={kind: tuple(None if one is None else one[1] for one in routers) for kind, routers in last.items()},
        missing=None,
    )


def _routers(line: Mapping[str, Any]) -> tuple[int, dict[str, tuple[float | None, tuple[float, ...]]]]:
    """Step, and by router relative entropy and load; one with a number that is not finite is left out."""
    routers = {str(name): _router(one) for name, one in line["routers"].items()}
    return int(line["step"]), {name: one for name, one in routers.items() if one is not None}


def _router(values: Mapping[str, Any]) -> tuple[float | None, tuple[float, ...]] | None:
    entropy, load = values["relative_entropy"], values["load"]
    if any(share is None for share in load):
        return None
    return None if entropy is None else float(entropy), tuple(float(share) for share in load)


def _entropy(routers: Iterable[tuple[float | None, tuple[float, ...]] | None]) -> float | None:
    return _mean(one[0] for one in routers if one is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def routing_at_evaluation(record: RunRecord) -> RoutingAtEvaluation:
    """What `eval/routing.json` says; nothing is raised for a file that is damaged or not there."""
    path = record.eval_folder / ROUTING_FILE
    if not path.is_file():
        return RoutingAtEvaluation((), None, None, "its routers were not looked at when it was scored")
    try:
        content = read_json(path)
        labels = sorted(map(_label, content["labels"]), key=lambda one: not one.trained)
        known = {"trained": sum(one.trained for one in labels), "all": len(labels)}
        controls = {side: _control(content["specialization"][side], count) for side, count in known.items()}
    except (LabError, ValueError, KeyError, TypeError, AttributeError) as error:
        return RoutingAtEvaluation((), None, None, f"{path}: cannot be read: {type(error).__name__}: {error}")
    missing = None if labels else "there was no held-out row and no task"
    return RoutingAtEvaluation(tuple(labels), controls["trained"], controls["all"], missing)


def _label(content: Mapping[str, Any]) -> LabelRouting:
    loads: dict[int, list[list[float]]] = {}
    for router in content["routers"].values():
        loads.setdefault(len(router["load"]), []).append(router["load"])
    return LabelRouting(
        label=str(content["label"]),
        source=str(content["source"]),
        trained=content["trained"] is True,
        sequences=int(content["sequences"]),
        tokens=int(content["tokens"]),
        loads={
            experts: tuple(statistics.fmean(shares) for shares in zip(*loads[experts], strict=True))
            for experts in sorted(loads)
        },
        relative_entropy=_mean(router["relative_entropy"] for router in content["routers"].values()),
        top2_mass=statistics.fmean(router["top2_mass"] for router in content["routers"].values()),
    )


def _control(content: Mapping[str, Any] | None, labels: int) -> Control | None:
    if content is None:
        return None
    return Control(
        labels=labels,
        statistic=float(content["statistic"]),
        shuffled_mean=float(content["shuffled_mean"]),
        shuffled_quantile_95=float(content["shuffled_quantile_95"]),
        p_value=float(content["p_value"]),
        permutations=int(content["permutations"]),
    )


def routing_rows(records: Sequence[RunRecord], table: SettingsTable) -> list[RoutingRow]:
    """The settings of a table whose method has routers, in its order, from the summaries in their completed runs'
    results; a trial that was repeated counts once."""
    completed: dict[str, dict[str, RunRecord]] = {}
    for record in records:
        if record.state == Status.COMPLETED and record.header is not None and has_routers(record):
            completed.setdefault(record.header.setting, {}).setdefault(record.header.fingerprint, record)
    routed = {record.setting for record in records if has_routers(record)}
    return [
        _row(row.setting, row.name, list(completed.get(row.setting, {}).values()))
        for row in table.rows
        if row.setting in routed
    ]


def _row(setting: str, name: str, records: Sequence[RunRecord]) -> RoutingRow:
    summaries = [(record, summary) for record in records if (summary := _summary(record)) is not None]
    why = "no completed run" if not records else "not measured" if not summaries else "no label of this side"
    cells = {}
    for measure in MEASURES:
        for side in SIDES:
            values = [(record, _side_mean(summary, measure, side)) for record, summary in summaries]
            cells[measure, side] = cell_of([_point(one, value) for one, value in values if value is not None], why)
    p_values = {
        side: tuple(_point(one, p) for one, summary in summaries if (p := summary["p_value"].get(side)) is not None)
        for side in ("trained", "all")
    }
    return RoutingRow(setting, name, cells, p_values)


def _summary(record: RunRecord) -> Mapping[str, Any] | None:
    facts = {} if record.result is None else record.result.facts
    summary: Mapping[str, Any] | None = facts.get("evaluation", {}).get("routing")
    return summary


def _side_mean(summary: Mapping[str, Any], measure: str, side: str) -> float | None:
    labels = [one for one in summary["labels"].values() if one["trained"] is (side == "trained")]
    return _mean(one[measure] for one in labels)


def _point(record: RunRecord, value: float) -> Point:
    return Point(record.run_id, seed_of(record), value, None)
