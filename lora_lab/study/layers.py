"""What a run's layer log says: norms of weights and of their change by layer, and how far experts lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_lab.plan.layer_groups import layer_of
from lora_lab.record.layer_log import read_observations
from lora_lab.record.run_record import RunRecord
from lora_lab.study.rank_correlation import RankCorrelation, rank_correlation

T = TypeVar("T")
Values = Mapping[str, float | None]

# Of a log with more, the first, the last and some between.
MOST_OBSERVATIONS = 8
# The places beside the layers, in the order in which a token passes them.
EMBEDDING, FINAL_NORM, HEAD = "embedding", "final_norm", "head"


@dataclass(frozen=True, slots=True)
class NormsAt:
    """Frobenius norms after `step` optimizer steps, by place in the order of `LayerNorms.places`; None where unknown.

    weight: of the weights. update: of their change since the start.
    """

    step: int
    weight: tuple[float | None, ...]
    update: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {"step": self.step, "weight": list(self.weight), "update": list(self.update)}


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """places: `embedding`, the layers' numbers ascending, `final_norm`, `head`, as far as they were observed.
    `missing`: why there is no observation."""

    places: tuple[str, ...]
    observations: tuple[NormsAt, ...]
    missing: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        observations = [one.to_json() for one in self.observations]
        return {"places": list(self.places), "observations": observations, "missing": self.missing}


@dataclass(frozen=True, slots=True)
class ExpertDistances:
    """How far a layer's experts lie apart after `step` optimizer steps.

    by_kind: by kind of module, in the order of `layers`; None for a single expert. mean: over the kinds, of the layers
    where each kind has a distance. trends: Spearman's rho of each kind against the layer's number, `trend` of the mean;
    None where there are too few layers. `missing`: why there is nothing.
    """

    step: int | None
    layers: tuple[int, ...]
    by_kind: dict[str, tuple[float | None, ...]]
    mean: tuple[float | None, ...]
    trends: dict[str, RankCorrelation | None]
    trend: RankCorrelation | None
    missing: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "step": self.step,
            "layers": list(self.layers),
            "by_kind": {kind: list(values) for kind, values in self.by_kind.items()},
            "mean": list(self.mean),
            "trends": {kind: None if one is None else one.to_json() for kind, one in self.trends.items()},
            "trend": None if self.trend is None else self.trend.to_json(),
            "missing": self.missing,
        }


def layer_norms(record: RunRecord) -> LayerNorms:
    """The norms of a run, whatever became of it; nothing is raised for a log that is damaged or not there."""
    found, missing = logged(record, "norms", _norms)
    names = dict.fromkeys(name for _, weight, update in found for name in (*weight, *update))
    places = tuple(sorted(names, key=_place))
    observations = tuple(
        NormsAt(step, tuple(weight.get(place) for place in places), tuple(update.get(place) for place in places))
        for step, weight, update in found
    )
    return LayerNorms(places, observations, missing)


def _norms(line: Mapping[str, Any]) -> tuple[int, Values, Values]:
    return int(line["step"]), numbers_of(line["weight"]), numbers_of(line["update"])


def _place(name: str) -> tuple[int, int, str]:
    if name.isdecimal():
        return 1, int(name), ""
    return {EMBEDDING: 0, FINAL_NORM: 2, HEAD: 3}.get(name, 4), 0, name


def expert_distances(record: RunRecord) -> ExpertDistances:
    """The distances at a run's last observation; nothing is raised for a log that is damaged or not there."""
    found, missing = logged(record, "experts", lambda line: (int(line["step"]), numbers_of(line["distances"])))
    if not found:
        return ExpertDistances(None, (), {}, (), {}, None, missing)
    step, distances = found[-1]
    layers, by_kind = by_layer(distances)
    mean = tuple(_mean_of_all([values[place] for values in by_kind.values()]) for place in range(len(layers)))
    if not any(value is not None for values in by_kind.values() for value in values):
        missing = "no layer has two experts whose distance is known"
    return ExpertDistances(
        step=step,
        layers=layers,
        by_kind=by_kind,
        mean=mean,
        trends={kind: _trend(layers, values) for kind, values in by_kind.items()},
        trend=_trend(layers, mean),
        missing=missing,
    )


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _trend(layers: Sequence[int], values: Sequence[float | None]) -> RankCorrelation | None:
    pairs = [(layer, value) for layer, value in zip(layers, values, strict=True) if value is not None]
    return rank_correlation([layer for layer, _ in pairs], [value for _, value in pairs])


def logged(record: RunRecord, kind: str, read: Callable[[Mapping[str, Any]], T]) -> tuple[list[T], str | None]:
    """The observations of one kind in the layer log, each through `read`: at most MOST_OBSERVATIONS, the first and the
    last among them; of a step that was taken twice the later. And why there are none."""
    path = record.layers_path
    try:
        lines = {int(line["step"]): read(line) for line in read_observations(path, kind)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [], f"{path}: cannot be read: {type(error).__name__}: {error}"
    if not lines:
        return [], "no layer was looked at yet" if record.state == "RUNNING" else f"the layer log holds no {kind}"
    return thinned([lines[step] for step in sorted(lines)]), None


def thinned(items: Sequence[T]) -> list[T]:
    """At most MOST_OBSERVATIONS of them, spread evenly, the first and the last included."""
    count = min(len(items), MOST_OBSERVATIONS)
    return [items[round(place * (len(items) - 1) / max(count - 1, 1))] for place in range(count)]


def by_layer(values: Mapping[str, T | None]) -> tuple[tuple[int, ...], dict[str, tuple[T | None, ...]]]:
    """Layers ascending, and by kind of module the value of each layer (None where it has no such module).

    values: by the module's full name. The kind is what follows the layer's number, shortened to its last part where no
    two kinds end alike: `up_proj`, but `attn.c_proj` and `mlp.c_proj`. Modules outside the layers are left out.
    """
    sites: dict[str, dict[int, T | None]] = {}
    for name, value in values.items():
        layer = layer_of(name)
        if layer is not None:
            sites.setdefault(name.partition(f".{layer}.")[2] or name, {})[layer] = value
    layers = tuple(sorted({layer for found in sites.values() for layer in found}))
    titles = _titles(sites)
    return layers, {titles[kind]: tuple(found.get(layer) for layer in layers) for kind, found in sites.items()}


def _titles(kinds: Iterable[str]) -> dict[str, str]:
    last = {kind: kind.rpartition(".")[2] for kind in kinds}
    ends = list(last.values())
    return {kind: end if ends.count(end) == 1 else kind for kind, end in last.items()}


def numbers_of(values: Mapping[str, Any]) -> dict[str, float | None]:
    """A mapping of the log as numbers; raises TypeError or ValueError for anything else than numbers and null."""
    return {str(name): None if value is None else float(value) for name, value in values.items()}
