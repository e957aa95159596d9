"""Figures as plotly's plain mappings (`data`, `layout`), made from what `study` computes.

The page draws them with plotly's script; a notebook shows them by `plotly.graph_objects.Figure(figure)`. Colours of
text and background are left to whoever draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.report.page_settings import BASE_COLOUR, COSTS, PALETTE
from lora_lab.report.text import clean, count_text, interval_text, number_text, value_text
from lora_lab.study.axes import SweptAxes
from lora_lab.study.curves import RunCurve, SettingCurve
from lora_lab.study.memory_parts import PARTS, MemoryParts
from lora_lab.study.pareto import ParetoFront
from lora_lab.study.table import MetricColumn, SettingRow, SettingsTable

Figure = dict[str, Any]

# What a score is drawn against, in the order of the choice.
COST_TITLES = {
    "peak_allocated_bytes": "peak memory",
    "train_seconds": "training time",
    "trainable_parameters": "trainable parameters",
}
_SUFFIX = {"peak_allocated_bytes": "B", "train_seconds": "s", "trainable_parameters": ""}
_LABEL_LIMIT = 40
_CLEAR_CURVES, _SHOWN_CURVES = 8, 6  # so many bands can be told apart; of more, so many are shown at first
_FEW = 10  # settings whose names fit beside their points
_MOST_REASONS = 3
_DASHES = ("solid", "dash", "dot", "dashdot")


def missing_figure(reason: str) -> Figure:
    """In the place of a figure: why there is none."""
    return {"missing": reason}


def drawable(figure: Figure) -> Figure:
    """For `plotly.graph_objects`: a figure that is missing becomes an empty one that says why."""
    if "data" in figure:
        return figure
    told = {"text": escaped(clean(figure["missing"])), "showarrow": False}
    hidden = {"visible": False}
    return {"data": [], "layout": {"annotations": [told], "xaxis": hidden, "yaxis": hidden}}


def learning_curves(curves: Sequence[SettingCurve], colours: Mapping[str, str], *, title: str) -> Figure:
    """Mean over seeds against the step, with its band; one colour per setting.

    Of many settings only the first are visible; a click on a name of the legend shows another.
    """
    data: list[dict[str, Any]] = []
    for index, curve in enumerate(curves):
        dash = _DASHES[index // len(PALETTE) % len(_DASHES)]
        traces = _setting_traces(curve, colours[curve.setting], dash=dash)
        if len(curves) > _CLEAR_CURVES and index >= _SHOWN_CURVES:
            traces = [{**trace, "visible": "legendonly"} for trace in traces]
        data += traces
    if not data:
        return missing_figure("no run has a step log with this value")
    return {"data": data, "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": title}}}}


def _setting_traces(curve: SettingCurve, colour: str, *, dash: str) -> list[dict[str, Any]]:
    """The band and the mean of a setting; its single runs where none has completed."""
    name = _label(curve.name)
    if not curve.steps:
        return [_lone_curve(run, curve.key, name, colour) for run in curve.runs]
    x = list(curve.steps)
    mean = {
        "x": x,
        "y": list(curve.mean),
        "name": name,
        "legendgroup": name,
        "mode": "lines",
        "line": {"color": colour, "width": 2, "dash": dash},
        "hovertemplate": f"{name}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
    }
    if curve.low is None or curve.high is None:
        return [mean]
    band = {
        "x": [*x, *reversed(x)],
        "y": [*curve.high, *reversed(curve.low)],
        "fill": "toself",
        "fillcolor": _faint(colour),
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": name,
    }
    return [band, mean]


def _lone_curve(run: RunCurve, key: str, name: str, colour: str) -> dict[str, Any]:
    """A run of a setting none of whose runs has completed: drawn by itself, thin."""
    series = run.series[key]
    return {
        "x": list(series.steps),
        "y": list(series.values),
        "name": f"{_label(run.name)} ({run.state})",
        "legendgroup": name,
        "mode": "lines",
        "line": {"color": colour, "width": 1, "dash": "dot"},
    }


def score_against_cost(
    front: ParetoFront, table: SettingsTable, column: MetricColumn, cost: str, colours: Mapping[str, str]
) -> Figure:
    """One point per setting, whiskers for the interval over seeds, and the Pareto front as a line."""
    rows = {row.setting: row for row in table.rows}
    points = [(point, rows[point.setting]) for point in front.points]
    if not points:
        why = "; ".join(list(dict.fromkeys(front.missing.values()))[:_MOST_REASONS])
        return missing_figure(
            f"no setting has both {column.name} and {COST_TITLES[cost]}" + (f" ({why})" if why else "")
        )
    write = {key: text for key, _, text in COSTS}[cost]
    on_front = sorted(((p.cost, p.score) for p, _ in points if p.on_front), key=lambda pair: pair[0])
    halves = [0.0 if (i := row.cells[column.name].interval) is None else i.half_width for _, row in points]
    labelled = [p.on_front or len(points) <= _FEW for p, _ in points]
    data: list[dict[str, Any]] = [
        {
            "x": [x for x, _ in on_front],
            "y": [y for _, y in on_front],
            "mode": "lines",
            "line": {"color": BASE_COLOUR, "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
            "name": "Pareto front",
        },
        {
            "x": [p.cost for p, _ in points],
            "y": [p.score for p, _ in points],
            "mode": "markers+text",
            "text": [_label(row.name) if shown else "" for (_, row), shown in zip(points, labelled, strict=True)],
            "textposition": "top center",
            "textfont": {"size": 11},
            "cliponaxis": False,
            "marker": {"size": 10, "color": [colours[row.setting] for _, row in points]},
            "error_y": {"array": halves, "thickness": 1, "width": 3, "color": BASE_COLOUR},
            "customdata": [[_label(row.name), _score_text(row, column), write(p.cost)] for p, row in points],
            "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>%{customdata[2]}<extra></extra>",
            "showlegend": False,
        },
    ]
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": COST_TITLES[cost]}, "tickformat": "~s", "ticksuffix": _SUFFIX[cost]},
            "yaxis": {"title": {"text": _metric_title(column)}},
            "legend": {"x": 1, "xanchor": "right", "y": 1},
        },
    }


def heat_map(table: SettingsTable, axes: SweptAxes, column: MetricColumn, x: str, y: str) -> Figure:
    """Mean score over all settings that share a value of both axes; the text says over how many."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in table.rows:
        values, mean = axes.settings.get(row.setting, {}), row.cells[column.name].mean
        if x in values and y in values and mean is not None and row.incomparable is None:
            groups.setdefault((value_text(values[x]), value_text(values[y])), []).append(mean)
    if not groups:
        return missing_figure(f"no setting has {x}, {y} and {column.name}")
    order = {axis.name: [value_text(value) for value in axis.values] for axis in axes.axes}
    xs, ys = ([text for text in order[axis] if any(key[i] == text for key in groups)] for i, axis in enumerate((x, y)))
    cells = [[groups.get((a, b), []) for a in xs] for b in ys]
    means = [[statistics.fmean(cell) if cell else None for cell in line] for line in cells]
    texts = [[_heat_text(cell) for cell in line] for line in cells]
    return heat_figure((x, xs), (y, ys), means, texts, unit=column.unit, lower_is_better=not column.higher_is_better)


def heat_figure(
    across: tuple[str, Sequence[str]],
    down: tuple[str, Sequence[str]],
    scores: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    *,
    unit: str,
    lower_is_better: bool,
) -> Figure:
    """A field per pair of values. across, down: an axis's name and its values; scores, texts: a line per value of
    `down`; texts may hold markup."""
    (x, xs), (y, ys) = across, down
    return {
        "data": [
            {
                "type": "heatmap",
                "x": [escaped(clean(a)) for a in xs],
                "y": [escaped(clean(b)) for b in ys],
                "z": scores,
                "text": texts,
                "texttemplate": "%{text}",
                "hovertemplate": f"{escaped(x)} %{{x}}<br>{escaped(y)} %{{y}}<br>%{{z:.4g}}<extra></extra>",
                "colorscale": "Cividis",
                "reversescale": lower_is_better,
                "xgap": 2,
                "ygap": 2,
                "colorbar": {"title": {"text": escaped(clean(unit))}, "thickness": 12},
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": escaped(x)}, "type": "category"},
            "yaxis": {"title": {"text": escaped(y)}, "type": "category"},
        },
    }


def memory_bars(parts: Sequence[MemoryParts]) -> Figure:
    """Parts of each setting's peak as one bar; a mark where the peak was predicted."""
    shown = [one for one in parts if one.missing is None]
    if not shown:
        return missing_figure(
            "; ".join(dict.fromkeys(f"{one.name}: {one.missing}" for one in parts)) or "no run has ended"
        )
    names = [_label(one.name) for one in shown]
    data: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": title,
            "y": names,
            "x": [one.parts[key] for one in shown],
            "marker": {"color": PALETTE[index]},
            "hovertemplate": "%{y}<br>" + title + ": %{x:.4s}B<extra></extra>",
        }
        for index, (key, title) in enumerate(PARTS.items())
    ]
    predicted = [one for one in shown if one.predicted_bytes is not None]
    if predicted:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "predicted peak",
                "y": [_label(one.name) for one in predicted],
                "x": [one.predicted_bytes for one in predicted],
                "marker": {"symbol": "line-ns-open", "size": 18, "line": {"width": 2}},
            }
        )
    return {
        "data": data,
        "layout": {
            "barmode": "stack",
            "height": 180 + 26 * len(shown),
            "xaxis": {"title": {"text": "bytes at the peak of a step"}, "tickformat": "~s", "ticksuffix": "B"},
            "yaxis": {"autorange": "reversed", "automargin": True},
        },
    }


def _heat_text(means: Sequence[float]) -> str:
    if not means:
        return ""
    return number_text(statistics.fmean(means)) + (f"<br><i>of {len(means)}</i>" if len(means) > 1 else "")


def _score_text(row: SettingRow, column: MetricColumn) -> str:
    cell = row.cells[column.name]
    if cell.interval is not None:
        text = interval_text(cell.interval.mean, cell.interval.half_width)
    else:
        text = number_text(cell.mean) if cell.mean is not None else "-"
    return f"{escaped(clean(column.name))}: {text} ({count_text(len(cell.points))} seeds)"


def _metric_title(column: MetricColumn) -> str:
    better = "higher is better" if column.higher_is_better else "lower is better"
    return f"{escaped(clean(column.name))} ({better})"


def _label(name: str) -> str:
    """A setting's name, short enough to stand in a figure; the tables have it whole."""
    text = clean(name)
    return escaped(text if len(text) <= _LABEL_LIMIT else f"{text[: _LABEL_LIMIT - 1]}…")


def escaped(text: str) -> str:
    """Plotly reads a few HTML tags in its texts, and %{...} in templates."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
