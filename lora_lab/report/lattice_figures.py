"""Figures of where adapters sit and of arms on two axes: a target lattice, and a heat map of the arms of a claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.report.figures import Figure, escaped, heat_figure, missing_figure
from lora_lab.report.page_settings import BASE_COLOUR, PALETTE
from lora_lab.report.text import clean, number_text, value_text
from lora_lab.schema.adaptation import PARTS
from lora_lab.schema.design import Values

_FRAME_PIXELS, _ROW_PIXELS = 150, 30
_NAME_LIMIT = 40


@dataclass(frozen=True, slots=True)
class LatticeRow:
    """One setting or arm. parts: of the target that it adapts (`PARTS`), exact modules not among them. value,
    half_width: its score and how far the whisker goes to each side; None where there is none."""

    name: str
    parts: frozenset[str]
    value: float | None
    half_width: float | None
    colour: str


def parts_of(trial: Mapping[str, Any]) -> frozenset[str] | None:
    """The parts that a trial adapts; None where it has no target, or one that names single modules."""
    target = trial.get("target")
    if not isinstance(target, Mapping) or target.get("modules"):
        return None
    return frozenset(part for part in PARTS if target.get(part))


def target_lattice(rows: Sequence[LatticeRow], *, score: str, whisker: str) -> Figure:
    """Left which parts each row adapts, right its score. score: the axis's title; whisker: what it shows."""
    if len({row.parts for row in rows}) < 2:
        return missing_figure("all settings adapt the same parts")
    if all(row.value is None for row in rows):
        return missing_figure("no setting has a score")
    used = [part for part in PARTS if any(part in row.parts for row in rows)]
    names = [_short(row.name) for row in rows]
    if len(set(names)) < len(names):  # two that begin alike would share a line
        names = [escaped(clean(row.name)) for row in rows]
    scored = [(name, row) for name, row in zip(names, rows, strict=True) if row.value is not None]
    data: list[dict[str, Any]] = [
        _dots(rows, names, used, adapted=False),
        _dots(rows, names, used, adapted=True),
        {
            "type": "scatter",
            "mode": "markers",
            "x": [row.value for _, row in scored],
            "y": [name for name, _ in scored],
            "xaxis": "x2",
            "marker": {"size": 10, "color": [row.colour for _, row in scored]},
            "error_x": {
                "array": [row.half_width or 0.0 for _, row in scored],
                "thickness": 1.5,
                "width": 4,
                "color": BASE_COLOUR,
            },
            "hovertemplate": "%{y}: %{x:.4g}<extra></extra>",
        },
    ]
    return {
        "data": data,
        "layout": {
            "height": _FRAME_PIXELS + _ROW_PIXELS * len(rows),
            "xaxis": {
                "domain": [0, 0.42],
                "type": "category",
                "side": "top",
                "showgrid": False,
                "categoryorder": "array",
                "categoryarray": used,
            },
            "xaxis2": {
                "domain": [0.5, 1],
                "anchor": "y",
                "title": {"text": f"{escaped(clean(score))}; {escaped(whisker)}"},
            },
            "yaxis": {
                "autorange": "reversed",
                "type": "category",
                "categoryorder": "array",
                "categoryarray": names,
                "showgrid": True,
            },
            "margin": {"t": 48},
            "showlegend": False,
        },
    }


def _dots(rows: Sequence[LatticeRow], names: Sequence[str], used: Sequence[str], *, adapted: bool) -> dict[str, Any]:
    """Full dots where a part is adapted, empty ones where not."""
    places = [
        (part, name, row.colour)
        for name, row in zip(names, rows, strict=True)
        for part in used
        if (part in row.parts) == adapted
    ]
    state = "adapted" if adapted else "frozen"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [part for part, _, _ in places],
        "y": [name for _, name, _ in places],
        "marker": {
            "size": 14 if adapted else 9,
            "symbol": "circle" if adapted else "circle-open",
            "color": [colour if adapted else BASE_COLOUR for _, _, colour in places],
            "opacity": 1.0 if adapted else 0.45,
        },
        "hovertemplate": f"%{{y}}: %{{x}} {state}<extra></extra>",
    }


def swept_keys(arms: Mapping[str, Values]) -> list[str]:
    """The keys in which arms differ: numbers last, and of these what has most values."""

    def order(key: str) -> tuple[bool, int, str]:
        values = [one.get(key) for one in arms.values()]
        return (_are_numbers(values), len(set(map(value_text, values))), key)

    keys = {key for values in arms.values() for key in values}
    return sorted((key for key in keys if order(key)[1] > 1), key=order)


def arm_map(
    arms: Mapping[str, Values], scores: Mapping[str, float | None], *, unit: str, lower_is_better: bool
) -> Figure:
    """The arms of a claim on the two axes in which they differ, each with its score."""
    keys = swept_keys(arms)
    if len(keys) != 2:
        return missing_figure(f"the arms differ in {len(keys)} axes, not in two")
    if all(score is None for score in scores.values()):
        return missing_figure("no arm has a score")
    down, across = keys
    xs, ys = (_ordered([values.get(key) for values in arms.values()]) for key in (across, down))
    cells = {(value_text(values.get(across)), value_text(values.get(down))): name for name, values in arms.items()}
    z = [[scores.get(cells.get((x, y), "")) for x in xs] for y in ys]
    texts = [[_cell_text(cells.get((x, y)), scores) for x in xs] for y in ys]
    drawn = heat_figure((across, xs), (down, ys), z, texts, unit=unit, lower_is_better=lower_is_better)
    return {**drawn, "layout": {**drawn["layout"], "height": _FRAME_PIXELS + 48 * len(ys)}}


def _ordered(values: Sequence[object]) -> list[str]:
    """Numbers ascending, all else in order of appearance."""
    if _are_numbers(values):
        return list(dict.fromkeys(value_text(value) for value in sorted(values)))  # type: ignore[type-var]
    return list(dict.fromkeys(map(value_text, values)))


def _are_numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _cell_text(name: str | None, scores: Mapping[str, float | None]) -> str:
    if name is None:
        return ""
    score = scores.get(name)
    return f"{'no score' if score is None else number_text(score)}<br><i>{escaped(clean(name))}</i>"


def _short(name: str) -> str:
    text = clean(name)
    return escaped(text if len(text) <= _NAME_LIMIT else f"{text[: _NAME_LIMIT - 1]}…")


def colour_of(index: int) -> str:
    """The colour of a row by its place."""
    return PALETTE[index % len(PALETTE)]
