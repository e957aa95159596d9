"""Figures by layer, as plotly's plain mappings (see `figures`): norms of weights, distances between experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.report.figures import Figure, escaped, missing_figure
from lora_lab.report.page_settings import PALETTE
from lora_lab.report.text import clean
from lora_lab.study.layers import EMBEDDING, FINAL_NORM, HEAD, ExpertDistances, LayerNorms, NormsAt

_DIGITS = 4
_LABELLED_LAYERS = 8
_PLACE_TITLES = {EMBEDDING: "embedding", FINAL_NORM: "final norm", HEAD: "head"}
_TICK_TITLES = {EMBEDDING: "embed", FINAL_NORM: "norm", HEAD: "head"}


def short(value: float) -> float:
    """A value to four digits: what a figure shows, at a quarter of the page's size."""
    return float(f"{value:.{_DIGITS}g}")


def norms_figure(norms: LayerNorms) -> Figure:
    """Norms of weights and of their change by layer on a logarithmic axis, at the first and the last observation.

    A change of 0 has no place on that axis. Weights that are the same at both observations are drawn once.
    """
    if not norms.observations:
        return missing_figure(norms.missing or "no layer was looked at")
    positions = _positions(norms.places)
    first, last = norms.observations[0], norms.observations[-1]
    data = []
    if first.step != last.step:
        if list(map(_point, first.weight)) != list(map(_point, last.weight)):
            data.append(_norms_line(positions, first.weight, f"weights, step {first.step}", PALETTE[0], dash="dot"))
        data.append(_norms_line(positions, first.update, f"change, step {first.step}", PALETTE[1], dash="dot"))
    data.append(_norms_line(positions, last.weight, f"weights, step {last.step}", PALETTE[0], dash="solid"))
    data.append(_norms_line(positions, last.update, f"change, step {last.step}", PALETTE[1], dash="solid"))
    data = [trace for trace in data if any(value is not None for value in trace["y"])]
    if not data:
        return missing_figure("every norm is 0 or was not finite")
    ticks = _layer_ticks(norms.places, positions)
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "layer"}, "zeroline": False, "tickangle": 0, **ticks},
            "yaxis": {"title": {"text": "Frobenius norm"}, "type": "log", "exponentformat": "power", "dtick": 1},
        },
    }


def _positions(places: Sequence[str]) -> list[int]:
    """Where the places stand: a layer at its number, what is before and behind the layers far enough off for a name."""
    layers = [int(place) for place in places if place.isdecimal()]
    apart = max(math.ceil(len(layers) / _LABELLED_LAYERS), 2)
    behind = max(layers, default=0)
    positions = []
    for place in places:
        if place.isdecimal():
            positions.append(int(place))
        elif place == EMBEDDING:
            positions.append(min(layers, default=0) - apart)
        else:
            behind += apart
            positions.append(behind)
    return positions


def _layer_ticks(places: Sequence[str], positions: Sequence[int]) -> dict[str, Any]:
    layers = [int(place) for place in places if place.isdecimal()]
    step = max(math.ceil(len(layers) / _LABELLED_LAYERS), 1)
    shown = [
        (position, escaped(clean(_TICK_TITLES.get(place, place))))
        for place, position in zip(places, positions, strict=True)
        if not place.isdecimal() or int(place) % step == 0
    ]
    return {"tickvals": [position for position, _ in shown], "ticktext": [text for _, text in shown]}


def _point(value: float | None) -> float | None:
    return short(value) if value else None


def _norms_line(
    positions: Sequence[int], values: Sequence[float | None], name: str, colour: str, *, dash: str
) -> dict[str, Any]:
    """A line that is broken between the layers and what stands before and behind them."""
    x: list[float] = []
    y: list[float | None] = []
    for position, value in zip(positions, map(_point, values), strict=True):
        if x and position - x[-1] > 1:
            x.append(position - 0.5)
            y.append(None)
        x.append(position)
        y.append(value)
    return {
        "x": x,
        "y": y,
        "name": name,
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2 if dash == "solid" else 1.5, "dash": dash},
        "marker": {"size": 5},
        "hovertemplate": f"{name}: %{{y:.4g}}<br>layer: %{{x}}<extra></extra>",
    }


def whole_ticks(layers: Sequence[int]) -> dict[str, Any]:
    """Labels for some layers, whole numbers all."""
    step = max(math.ceil(len(layers) / _LABELLED_LAYERS), 1)
    return {"tickvals": [layer for layer in layers if layer % step == 0]}


def kind_line(index: int, name: str) -> dict[str, Any]:
    """What the lines of the kinds of modules have in common; colours in the order of the kinds."""
    return {
        "name": escaped(clean(name)),
        "mode": "lines+markers",
        "line": {"color": PALETTE[index % len(PALETTE)], "width": 2},
        "marker": {"size": 6},
    }


def distances_figure(distances: ExpertDistances) -> Figure:
    """Mean distance between a layer's experts, one line per kind of module, its trend beside its name."""
    if distances.missing is not None:
        return missing_figure(distances.missing)
    data = [
        {
            "x": list(distances.layers),
            "y": [None if value is None else short(value) for value in values],
            **kind_line(index, _with_trend(kind, distances)),
            "hovertemplate": f"layer %{{x}}, {escaped(clean(kind))}: %{{y:.4g}}<extra></extra>",
        }
        for index, (kind, values) in enumerate(distances.by_kind.items())
        if any(value is not None for value in values)
    ]
    return {
        "data": data,
        "layout": {
            "height": 380,
            "xaxis": {"title": {"text": "layer"}, "zeroline": False, **whole_ticks(distances.layers)},
            "yaxis": {"title": {"text": "distance between experts"}, "rangemode": "tozero"},
            "showlegend": True,
        },
    }


def _with_trend(kind: str, distances: ExpertDistances) -> str:
    trend = distances.trends[kind]
    return kind if trend is None else f"{kind}: rho = {trend.rho:.2f}"


def unchanged_places(norms: LayerNorms) -> list[str]:
    """Titles of the places whose weights had not changed at the last observation, runs of layers in short."""
    last: NormsAt | None = norms.observations[-1] if norms.observations else None
    if last is None:
        return []
    still = [place for place, update in zip(norms.places, last.update, strict=True) if update == 0]
    return [*_ranges([int(place) for place in still if place.isdecimal()]), *_named(still)]


def _named(places: Sequence[str]) -> list[str]:
    titles: Mapping[str, str] = _PLACE_TITLES
    return [titles.get(place, place) for place in places if not place.isdecimal()]


def _ranges(layers: Sequence[int]) -> list[str]:
    groups: list[list[int]] = []
    for layer in layers:
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return [f"layer {one[0]}" if len(one) == 1 else f"layers {one[0]} to {one[-1]}" for one in groups]
