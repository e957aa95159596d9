"""The plot of `memory_measured`, with the rows of `memory_published` where they are: one HTML file, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_COLOURS = {"measured": "#0072b2", "published": "#d55e00"}
_TITLES = (
    "Predicted against measured here (GB, 1e9 bytes)",
    "Predicted against published (GB, 1e9 bytes)",
    "Error of each trial measured here",
    "Error of each published row",
)


def write_plot(measured: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]], path: Path) -> None:
    """measured: trials of `memory_measured`; published: rows of `memory_published`. Those without an error are left
    out: they have no place on either axis."""
    figure = make_subplots(rows=2, cols=2, subplot_titles=_TITLES, vertical_spacing=0.12)
    known = [one for one in measured if "error_percent" in one]
    names = [f"{one['model']}: {one['trial']}" for one in known]
    sizes = [(one["measured_bytes"] / 1e9, one["predicted_bytes"] / 1e9) for one in known]
    _add(figure, "measured", names, sizes, [one["error_percent"] for one in known], column=1)
    known = [one for one in published if "error_percent" in one]
    names = [f"{one['model']} {one['method']} {one['rank']} {one['quantization']}, {one['source']}" for one in known]
    sizes = [(float(one["published_peak_gb"]), one["predicted_gb"]) for one in known]
    _add(figure, "published", names, sizes, [one["error_percent"] for one in known], column=2)
    figure.update_layout(height=900, template="plotly_white", title="Memory of a training step", showlegend=False)
    figure.write_html(path, include_plotlyjs=True)


def _add(
    figure: Any, kind: str, names: list[str], sizes: list[tuple[float, float]], errors: list[float], *, column: int
) -> None:
    """sizes: as told elsewhere and as predicted, in GB. errors: percent."""
    told, predicted = [size for size, _ in sizes], [size for _, size in sizes]
    marks = {"mode": "markers", "marker": {"color": _COLOURS[kind], "size": 7}, "text": names}
    figure.add_trace(go.Scatter(x=told, y=predicted, **marks), row=1, col=column)
    if told:
        ends = [min(told), max(told)]
        same = {"mode": "lines", "line": {"dash": "dot", "color": "grey"}, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=ends, y=ends, **same), row=1, col=column)
    figure.add_trace(go.Scatter(x=told, y=errors, **marks), row=2, col=column)
    for row, title in ((1, "predicted"), (2, "error, %")):
        figure.update_xaxes(title_text=kind, type="log", row=row, col=column)
        figure.update_yaxes(title_text=title, type="log" if row == 1 else "linear", row=row, col=column)
