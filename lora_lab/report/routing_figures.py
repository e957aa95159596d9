"""Figures of routers, as plotly's plain mappings (see `figures`): who gets the tokens, and how evenly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lora_lab.report.figures import Figure, escaped, missing_figure
from lora_lab.report.layer_figures import kind_line, short, whole_ticks
from lora_lab.report.text import clean
from lora_lab.study.routing import LabelRouting, RoutingAtEvaluation, RoutingInTraining

# Below an even share, even, above: told apart by everybody, on light and on dark.
_LESS, _EVEN, _MORE = "#2B6CB0", "#C5CAD0", "#D1495B"
_LEAST_AWAY = 0.25  # smaller differences from an even share keep pale colours
_MARGIN = {"b": 36}  # the axes below have labels and no title
_SOURCES = {"heldout": "held-out rows"}
_LABEL_LIMIT = 24
_MOST_NUMBERS = 12  # columns into which a number fits


def load_figure(training: RoutingInTraining) -> Figure:
    """How the tokens' weight is shared among the experts of every layer at the end: one panel per kind of module.

    A cell is the expert's mean weight times the number of experts of its layer, so 1 is an even share whatever their
    number. Where a layer has fewer experts than others the row ends.
    """
    columns = {
        kind: max((len(one) for one in loads if one is not None), default=0) for kind, loads in training.loads.items()
    }
    if not any(columns.values()):
        return missing_figure(training.missing or "no router was looked at")
    panels = _panels(list(columns.values()))
    shares = {
        kind: [None if one is None else [short(share * len(one)) for share in one] for one in loads]
        for kind, loads in training.loads.items()
    }
    layout: dict[str, Any] = {
        "height": 120 + _row_height(len(training.layers)) * len(training.layers),
        "yaxis": {"title": {"text": "layer"}, "showgrid": False, "zeroline": False, **whole_ticks(training.layers)},
        "margin": _MARGIN,
        "coloraxis": _share_colours(row for rows in shares.values() for row in rows if row is not None),
    }
    data = []
    for index, (kind, count) in enumerate(columns.items()):
        layout[f"xaxis{_suffix(index)}"] = _panel_axis(panels[index], count, escaped(clean(kind)))
        data.append(
            {
                "type": "heatmap",
                "x": list(range(1, count + 1)),
                "y": list(training.layers),
                "z": [_filled(row, count) for row in shares[kind]],
                "xaxis": f"x{_suffix(index)}",
                "coloraxis": "coloraxis",
                "xgap": 1,
                "ygap": 1,
                "hovertemplate": f"layer %{{y}}, {escaped(clean(kind))}<br>expert %{{x}}: "
                "%{z:.3g} times an even share<extra></extra>",
            }
        )
    return {"data": data, "layout": layout}


def _suffix(index: int) -> str:
    """Plotly's first axis has no number, the next is the second."""
    return "" if index == 0 else str(index + 1)


def _panels(columns: Sequence[int]) -> list[list[float]]:
    """Domains of panels side by side, as wide as they have columns, with a gap between two."""
    gap = 0.15 / len(columns) if len(columns) > 1 else 0.0
    unit = (1 - gap * (len(columns) - 1)) / sum(columns)
    starts = [sum(columns[:index]) * unit + index * gap for index in range(len(columns))]
    return [
        [round(start, 4), round(min(start + count * unit, 1), 4)] for start, count in zip(starts, columns, strict=True)
    ]


def _panel_axis(domain: Sequence[float], count: int, title: str) -> dict[str, Any]:
    """An axis of experts whose only label is the panel's title."""
    return {
        "domain": domain,
        "range": [0.5, count + 0.5],
        "tickvals": [(count + 1) / 2],
        "ticktext": [title],
        "showgrid": False,
        "zeroline": False,
    }


def _share_colours(rows: Iterable[Sequence[float]]) -> dict[str, Any]:
    """An even share in the middle and the farthest from it at an end; from nothing on, where somebody has twice it."""
    values = [value for row in rows for value in row]
    away = max([_LEAST_AWAY, *(abs(value - 1) for value in values)])
    low, high = short(max(1 - away, 0.0)), short(1 + away)
    return {
        "cmin": low,
        "cmax": high,
        "colorscale": [[0, _LESS], [(1 - low) / (high - low), _EVEN], [1, _MORE]],
        "colorbar": {
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yanchor": "bottom",
            "len": 0.4,
            "ypad": 4,
            "thickness": 10,
            "tickvals": [low, 1, high],
            "ticktext": [f"{low:.2f}x" if low else "0", "even", f"{high:.2f}x"],
            "ticklabeloverflow": "allow",
        },
    }


def _row_height(rows: int) -> int:
    return 26 if rows <= 12 else 14 if rows <= 40 else 9


def _filled(row: Sequence[float] | None, count: int) -> list[float | None]:
    known = [] if row is None else list(row)
    return [*known, *[None] * (count - len(known))]


def entropy_figure(training: RoutingInTraining) -> Figure:
    """Relative entropy of the routers against the step, one line per kind of module (mean over layers)."""
    lines = {kind: values for kind, values in training.relative_entropy.items() if any(v is not None for v in values)}
    if not lines:
        return missing_figure(training.missing or "no layer has two experts to choose from")
    data = [
        {
            "x": list(training.steps),
            "y": [None if value is None else short(value) for value in values],
            **kind_line(index, kind),
            "hovertemplate": f"{escaped(clean(kind))}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
        }
        for index, (kind, values) in enumerate(lines.items())
    ]
    return {
        "data": data,
        "layout": {
            "height": 340,
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "relative entropy"}, "range": [0, 1.03]},
            "showlegend": True,
        },
    }


def tasks_figure(evaluation: RoutingAtEvaluation) -> Figure:
    """Load by task and expert, mean over all routers with as many experts (one panel per number of experts); tasks that
    were trained on above the others, each group below its heading."""
    counts = sorted({experts for one in evaluation.labels for experts in one.loads if experts > 1})
    if not counts:
        return missing_figure(evaluation.missing or "no layer has two experts to choose from")
    rows = _task_rows(evaluation.labels)
    panels = _panels(counts)
    layout: dict[str, Any] = {
        "height": 110 + 24 * len(rows),
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [title for title, _ in rows],
            "range": [len(rows) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
        "margin": _MARGIN,
        "coloraxis": _share_colours(
            [share * experts for share in one.loads.get(experts, ())] for one in evaluation.labels for experts in counts
        ),
    }
    data = []
    for index, experts in enumerate(counts):
        layout[f"xaxis{_suffix(index)}"] = _panel_axis(panels[index], experts, f"{experts} experts")
        data.append(_task_panel(rows, experts, _suffix(index), has_numbers=sum(counts) <= _MOST_NUMBERS))
    return {"data": data, "layout": layout}


def _task_rows(labels: Sequence[LabelRouting]) -> list[tuple[str, LabelRouting | None]]:
    """Titles with their label; a heading has none."""
    rows: list[tuple[str, LabelRouting | None]] = []
    for heading, trained in (("trained on", True), ("not trained on", False)):
        members = [one for one in labels if one.trained is trained]
        if members:
            rows.append((f"<b>{heading}</b>", None))
            rows += [(_title(one), one) for one in members]
    return rows


def _title(label: LabelRouting) -> str:
    text = clean(label.label)
    return escaped(text if len(text) <= _LABEL_LIMIT else f"{text[: _LABEL_LIMIT - 1]}…")


def _task_panel(
    rows: Sequence[tuple[str, LabelRouting | None]], experts: int, suffix: str, *, has_numbers: bool
) -> dict[str, Any]:
    loads = [() if label is None else label.loads.get(experts, ()) for _, label in rows]
    told = [
        "" if one is None else escaped(clean(f"{one.label} ({_SOURCES.get(one.source, one.source)})"))
        for _, one in rows
    ]
    panel = {
        "type": "heatmap",
        "x": list(range(1, experts + 1)),
        "y": list(range(len(rows))),
        "z": [_filled([short(share * experts) for share in load], experts) for load in loads],
        "customdata": [[text] * experts for text in told],
        "xaxis": f"x{suffix}",
        "coloraxis": "coloraxis",
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{customdata}<br>expert %{x}: %{z:.3g} times an even share<extra></extra>",
    }
    return {**panel, "texttemplate": "%{z:.2f}"} if has_numbers else panel
