"""The plots of `sweep_speed`: one HTML file that needs no network, from the mapping that its JSON file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tests.benchmarks.sweep_table import totals

_OURS, _THEIRS = "#0072b2", "#d55e00"
_TITLES = (
    "Wall time of the whole sweep",
    "How our time grows with the number of trials (training alone)",
    "Losses of a pair of runs fed alike, step by step",
)


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes the plots of whatever parts `result` has."""
    figure = make_subplots(rows=3, cols=1, subplot_titles=_TITLES, vertical_spacing=0.1)
    both = totals(result)
    if both is not None:
        bars = {"x": ["theirs", "ours"], "y": [both["theirs"], both["ours"]], "marker_color": [_THEIRS, _OURS]}
        figure.add_trace(go.Bar(**bars, showlegend=False), row=1, col=1)
    _add_growth(figure, result["growth"])
    for pair in result["equality"].values():
        for (side, losses), colour in zip(pair["losses"].items(), (_OURS, _THEIRS), strict=True):
            steps = list(range(1, len(losses) + 1))
            line = {"mode": "lines+markers", "marker_color": colour, "name": side}
            figure.add_trace(go.Scatter(x=steps, y=losses, **line), row=3, col=1)
    for row, x, y in ((1, None, "seconds"), (2, "trials", "seconds"), (3, "step", "nats per loss token")):
        figure.update_xaxes(title_text=x, row=row, col=1)
        figure.update_yaxes(title_text=y, rangemode="tozero", row=row, col=1)
    figure.update_layout(height=1300, template="plotly_white", title=_title(result, both))
    figure.write_html(path, include_plotlyjs=True)


def _add_growth(figure: Any, growth: Mapping[str, Any]) -> None:
    trials = [int(count) for count in growth]
    seconds = [one["seconds"] for one in growth.values()]
    line = {"mode": "lines+markers", "marker_color": _OURS, "name": "ours"}
    figure.add_trace(go.Scatter(x=trials, y=seconds, **line), row=2, col=1)
    if trials:
        times = {"mode": "lines", "line": {"dash": "dot", "color": "grey"}, "name": "the first one's time, n times"}
        figure.add_trace(go.Scatter(x=trials, y=[seconds[0] * count / trials[0] for count in trials], **times), 2, 1)


def _title(result: Mapping[str, Any], both: Mapping[str, Any] | None) -> str:
    ratio = "" if both is None else f": {both['ratio']:.1f} times shorter"
    return f"A sweep of {result['sweep']['model']}, {result['dtype']}, {result['threads']} threads{ratio}"
