"""The plots of `train_speed`: one HTML file that needs no network, from the mapping that its JSON file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tests.benchmarks.train_rows import SIDES
from tests.benchmarks.train_table import MEMORY_GOAL, name_of

_COLOURS = {"trainer": "#d55e00", "trl": "#e69f00", "trl_kept": "#f0c060", "solo": "#56b4e9"}
_COHORTS = ("#9ecae1", "#4292c6", "#0072b2", "#08306b")
_TITLES = (
    "Real tokens per second (bars: median; whiskers: least and most) and the limit of the matrix products",
    "Times as fast as Trainer + PEFT in the same round",
    "Share of the model's own products at that number of rows",
    "Peak of a step at the same tokens per forward, in times one run alone",
)


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes the plots of whatever parts `result` has."""
    figure = make_subplots(rows=4, cols=1, subplot_titles=_TITLES, vertical_spacing=0.09)
    for index, side in enumerate(SIDES):
        _add_side(figure, result["cases"], side, _COLOURS.get(side) or _COHORTS[index % len(_COHORTS)])
    limits = {name: case["limit_tokens_per_second"] for name, case in result["cases"].items()}
    marks = {"mode": "markers", "marker": {"symbol": "line-ew-open", "size": 60, "color": "black"}, "name": "limit"}
    figure.add_trace(go.Scatter(x=list(limits), y=list(limits.values()), **marks), row=1, col=1)
    _add_memory(figure, result["memory"])
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="tokens/s", row=1, col=1)
    figure.update_yaxes(title_text="times", row=2, col=1)
    figure.update_yaxes(title_text="share", tickformat=".0%", row=3, col=1)
    figure.update_yaxes(title_text="times", row=4, col=1)
    figure.update_xaxes(title_text="members", type="log", row=4, col=1)
    figure.update_layout(height=1900, template="plotly_white", title=_title(result), barmode="group")
    figure.write_html(path, include_plotlyjs=True)


def _add_side(figure: Any, cases: Mapping[str, Any], side: str, colour: str) -> None:
    found = {name: case["sides"][side] for name, case in cases.items() if side in case["sides"]}
    look = {"marker_color": colour, "name": name_of(side), "legendgroup": side}
    _add_bars(figure, {name: one["tokens_per_second"] for name, one in found.items()}, look, row=1)
    ratios = {name: one["ratio"] for name, one in found.items() if one["ratio"] is not None}
    _add_bars(figure, ratios, {**look, "showlegend": False}, row=2)
    shares = {name: one["share_of_own_shapes"] for name, one in found.items()}
    figure.add_trace(go.Bar(x=list(shares), y=list(shares.values()), **look, showlegend=False), row=3, col=1)


def _add_bars(figure: Any, spreads: Mapping[str, Mapping[str, float]], look: Mapping[str, Any], *, row: int) -> None:
    error = {
        "array": [one["most"] - one["median"] for one in spreads.values()],
        "arrayminus": [one["median"] - one["least"] for one in spreads.values()],
    }
    medians = [one["median"] for one in spreads.values()]
    figure.add_trace(go.Bar(x=list(spreads), y=medians, error_y=error, **look), row=row, col=1)


def _add_memory(figure: Any, memory: Mapping[str, Any]) -> None:
    for name, found in memory.items():
        ratios = found.get("ratio", {})
        line = {"mode": "lines+markers", "name": f"memory, {name}"}
        figure.add_trace(go.Scatter(x=[int(key) for key in ratios], y=list(ratios.values()), **line), row=4, col=1)
    if memory:
        figure.add_hline(y=MEMORY_GOAL, line_dash="dot", row=4, col=1)


def _title(result: Mapping[str, Any]) -> str:
    speeds = result["matrix_product_gflops"]
    top = f"; {max(speeds):.0f} GFLOP/s in one large product" if speeds else ""
    return f"Training, {result['dtype']}, {result['threads']} threads, medians of {result['turns']} turns{top}"
