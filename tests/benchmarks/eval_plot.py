"""The plots of `eval_speed`: one HTML file that needs no network, from the mapping that its JSON file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_COLOURS = {"stock": "#d55e00", "tree": "#0072b2"}
_NAMES = {"stock": "lm-eval's own", "tree": "ours"}
_TITLES = (
    "Times faster than lm-eval's own, and the target",
    "Share of what matrix products alone would allow",
    "Cost by number of requests",
    "Cost by tokens of the shared prefix",
    "Cost by chunk budget",
    "Largest difference of a log-likelihood",
)


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes the plots of whatever parts `result` has."""
    figure = make_subplots(rows=3, cols=2, subplot_titles=_TITLES, vertical_spacing=0.12)
    _add_rows(figure, result.get("rows", []))
    _add_growth(figure, result.get("request_growth", []), "requests", column=1, legend=True)
    _add_growth(figure, result.get("prefix_growth", []), "prefix_tokens", column=2, legend=False)
    budgets = result.get("chunk_spread", {}).get("budgets", [])
    x = [str(one["chunk_tokens"]) for one in budgets]
    bars = go.Bar(x=x, y=[one["seconds"] for one in budgets], marker_color=_COLOURS["tree"], showlegend=False)
    figure.add_trace(bars, row=3, col=1)
    _name_axes(figure)
    figure.update_layout(height=1300, template="plotly_white", title=_title(result))
    figure.write_html(path, include_plotlyjs=True)


def _add_rows(figure: Any, rows: list[Mapping[str, Any]]) -> None:
    ratios = [row["ratio"] for row in rows]
    _add_points(figure, [row["row"] for row in rows], ratios, ".3g", row=1, column=1)
    names, targets = [row["row"] for row in rows], [row["target"] for row in rows]
    marks = {"mode": "markers", "marker": {"symbol": "line-ew-open", "size": 24, "color": "black"}, "name": "target"}
    figure.add_trace(go.Scatter(x=names, y=targets, **marks), row=1, col=1)
    limited = [row for row in rows if row["share_of_limit"] is not None]
    names, shares = [row["row"] for row in limited], [row["share_of_limit"] for row in limited]
    figure.add_trace(go.Bar(x=names, y=shares, marker_color=_COLOURS["tree"], showlegend=False), row=1, col=2)
    compared = [row for row in rows if row["largest_difference"]]  # a logarithm has no place for 0
    nats = [row["largest_difference"] for row in compared]
    _add_points(figure, [row["row"] for row in compared], nats, ".1e", row=3, column=2)


def _add_points(figure: Any, names: list[str], values: list[float], form: str, *, row: int, column: int) -> None:
    """Values with their numbers, for a logarithmic axis: it has no zero for bars to stand on."""
    marks = {"mode": "markers+text", "marker": {"color": _COLOURS["tree"], "size": 10}, "showlegend": False}
    texts = {"text": [format(value, form) for value in values], "textposition": "top center"}
    figure.add_trace(go.Scatter(x=names, y=values, **marks, **texts), row=row, col=column)


def _add_growth(figure: Any, points: list[Mapping[str, Any]], key: str, *, column: int, legend: bool) -> None:
    for engine, name in _NAMES.items():
        run = [point for point in points if point["seconds"][engine] is not None]
        line = {"mode": "lines+markers", "marker_color": _COLOURS[engine], "name": name, "showlegend": legend}
        seconds = [point["seconds"][engine] for point in run]
        figure.add_trace(go.Scatter(x=[point[key] for point in run], y=seconds, **line), row=2, col=column)


def _name_axes(figure: Any) -> None:
    figure.update_yaxes(title_text="times", type="log", row=1, col=1)
    figure.update_yaxes(title_text="share", tickformat=".0%", rangemode="tozero", row=1, col=2)
    for column, title in ((1, "requests"), (2, "tokens that all requests begin with")):
        figure.update_xaxes(title_text=title, row=2, col=column)
        figure.update_yaxes(title_text="seconds", rangemode="tozero", row=2, col=column)
    figure.update_xaxes(type="log", row=2, col=1)
    figure.update_yaxes(type="log", rangemode="normal", row=2, col=1)
    figure.update_xaxes(title_text="tokens of one pass", row=3, col=1)
    figure.update_yaxes(title_text="seconds", rangemode="tozero", row=3, col=1)
    figure.update_yaxes(title_text="nats", type="log", exponentformat="power", row=3, col=2)


def _title(result: Mapping[str, Any]) -> str:
    return (
        f"Scoring {result['model']}, {result['dtype']}, {result['threads']} threads, batches of {result['batch_size']} "
        f"for lm-eval's own; {max(result['matrix_product_gflops']):.0f} GFLOP/s in one large product"
    )
