"""Figures of claims: differences with their intervals against what is needed, costs, published numbers and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.report.claims_view import form_text
from lora_lab.report.figures import Figure, escaped, missing_figure
from lora_lab.report.page_settings import BASE_COLOUR, PALETTE
from lora_lab.report.text import clean, count_text
from lora_lab.schema.claims import Claim, Published
from lora_lab.study.verdict import Contrast, Verdict
from lora_lab.study.verdict_words import number, percent

_REGION = "rgba(34,136,51,0.13)"
_FORM_COLOURS: Mapping[str | None, str] = {"as_published": PALETTE[0], "tuned": PALETTE[1], None: PALETTE[0]}
_ROW_PIXELS, _FRAME_PIXELS = 34, 130
_SECONDS, _BYTES = "seconds", "bytes"
# An axis goes on by this share of what is shown.
_BEYOND = 0.08
_EDGE = {"color": PALETTE[2], "width": 1.5, "dash": "dash"}
_NO_DIFFERENCE = {"color": BASE_COLOUR, "width": 1.5}


def forest_plot(verdicts: Sequence[Verdict]) -> Figure:
    """Every difference with its interval, one row each, forms in colours; the region in which the claim holds is
    shaded, its edges (smallest difference, margins) are dashed."""
    shown = [one for one in verdicts if one.contrasts]
    if not shown:
        reasons = dict.fromkeys(reason for one in verdicts for reason in one.reasons[:1])
        return missing_figure("; ".join(reasons) or "no difference was estimated")
    lines = {one.form: _lines(one) for one in shown}
    ends = [end for found in lines.values() for line in found for end in (line.interval_low, line.interval_high)]
    rows = sum(map(len, lines.values()))
    several = len(shown) > 1
    extent = _extent(shown[0].low, shown[0].high, [*ends, 0.0])
    return {
        "data": [_forest_trace(one, lines[one.form], several=several) for one in shown],
        "layout": {
            "height": _FRAME_PIXELS + _ROW_PIXELS * rows,
            "xaxis": {"title": {"text": _difference_title(shown[0])}, "range": list(extent)},
            "yaxis": {"autorange": "reversed", "type": "category"},
            "shapes": [_line(0.0, _NO_DIFFERENCE), *_region_shapes(shown[0].low, shown[0].high, extent)],
            "showlegend": False,
        },
    }


def _lines(verdict: Verdict) -> list[Contrast]:
    """The contrasts, and before them the interval that was held against the region where it is none of theirs."""
    found = list(verdict.contrasts)
    low, high, confidence = verdict.interval_low, verdict.interval_high, verdict.confidence
    if verdict.estimate is None or low is None or high is None or confidence is None:
        return found
    if any((one.interval_low, one.interval_high) == (low, high) for one in found):
        return found
    return [Contrast("against the best of the others", verdict.estimate, confidence, low, high), *found]


def _forest_trace(verdict: Verdict, lines: Sequence[Contrast], *, several: bool) -> dict[str, Any]:
    colour = _FORM_COLOURS[verdict.form]
    centres = [one.estimate.difference for one in lines]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": form_text(verdict.form),
        "x": centres,
        "y": [_row_name(one.name, verdict, several=several) for one in lines],
        "error_x": {
            "array": [one.interval_high - centre for one, centre in zip(lines, centres, strict=True)],
            "arrayminus": [centre - one.interval_low for one, centre in zip(lines, centres, strict=True)],
            "thickness": 1.8,
            "width": 6,
            "color": colour,
        },
        "marker": {"size": 10, "symbol": "square", "color": colour},
        "customdata": [_contrast_text(one) for one in lines],
        "hovertemplate": "%{y}<br>%{customdata}<extra></extra>",
    }


def _row_name(name: str, verdict: Verdict, *, several: bool) -> str:
    """With the form where there are several of them."""
    form = form_text(verdict.form) if several else ""
    return escaped(clean(f"{name} ({form})" if form else name))


def _contrast_text(contrast: Contrast) -> str:
    ends = f"{number(contrast.interval_low)} to {number(contrast.interval_high)}"
    return f"{number(contrast.estimate.difference)} ({percent(contrast.confidence)} interval {ends})"


def _difference_title(verdict: Verdict) -> str:
    unit = f" ({verdict.unit})" if verdict.unit else ""
    return escaped(clean(f"difference of {verdict.metric}{unit}"))


def _extent(low: float | None, high: float | None, ends: Sequence[float]) -> tuple[float, float]:
    """What an axis shows: all of the ends, both edges of the region, and a little beyond."""
    every = [*ends, *(edge for edge in (low, high) if edge is not None)]
    beyond = _BEYOND * ((max(every) - min(every)) or abs(every[0]) or 1.0)
    return min(every) - beyond, max(every) + beyond


def _region_shapes(low: float | None, high: float | None, extent: tuple[float, float]) -> list[dict[str, Any]]:
    """The region from low to high as a band, an open end as far as the axis goes; its edges dashed."""
    band = {
        "type": "rect",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "x0": extent[0] if low is None else low,
        "x1": extent[1] if high is None else high,
        "fillcolor": _REGION,
        "line": {"width": 0},
        "layer": "below",
    }
    return [band, *(_line(edge, _EDGE) for edge in (low, high) if edge is not None)]


def _line(x: float, line: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x, "line": dict(line), "layer": "below"}


def cost_bars(verdicts: Sequence[Verdict]) -> Figure:
    """Left what each arm cost, right the ratio with its interval, and where it must lie for the claim to hold."""
    shown = [one for one in verdicts if one.value is not None and any(arm.value is not None for arm in one.arms)]
    if not shown:
        reasons = dict.fromkeys(reason for one in verdicts for reason in one.reasons[:1])
        return missing_figure("; ".join(reasons) or "no cost was measured")
    several = len(shown) > 1
    bars = [_cost_trace(one, several=several) for one in shown]
    ratios = [{**_ratio_trace(one), "xaxis": "x2", "yaxis": "y2"} for one in shown]
    ends = [end for one in shown for end in (one.value, one.interval_low, one.interval_high) if end is not None]
    extent = _extent(shown[0].low, shown[0].high, [*ends, 1.0])
    lines = [_line(1.0, _NO_DIFFERENCE), *_region_shapes(shown[0].low, shown[0].high, extent)]
    measure = shown[0].metric or ""
    rows = sum(len(one.arms) for one in shown)
    return {
        "data": [*bars, *ratios],
        "layout": {
            "height": _FRAME_PIXELS + _ROW_PIXELS * max(rows, 2),
            "xaxis": {"domain": [0, 0.46], "title": {"text": escaped(clean(measure))}, **_ticks(measure)},
            "yaxis": {"autorange": "reversed", "type": "category"},
            "xaxis2": {"domain": [0.6, 1], "anchor": "y2", "title": {"text": "ratio"}, "range": list(extent)},
            "yaxis2": {"anchor": "x2", "type": "category", "showticklabels": len(shown) > 1},
            "shapes": [{**line, "xref": "x2"} for line in lines],
            "showlegend": False,
        },
    }


def _cost_trace(verdict: Verdict, *, several: bool) -> dict[str, Any]:
    arms = [arm for arm in verdict.arms if arm.value is not None]
    return {
        "type": "bar",
        "orientation": "h",
        "name": form_text(verdict.form),
        "y": [_row_name(arm.name, verdict, several=several) for arm in arms],
        "x": [arm.value for arm in arms],
        "marker": {"color": [PALETTE[index % len(PALETTE)] for index, _ in enumerate(arms)]},
        "width": 0.6,
        "hovertemplate": "%{y}: %{x:.4s}<extra></extra>",
    }


def _ratio_trace(verdict: Verdict) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": form_text(verdict.form),
        "x": [verdict.value],
        "y": [form_text(verdict.form) or "ratio"],
        "marker": {"size": 10, "symbol": "square", "color": _FORM_COLOURS[verdict.form]},
        "hovertemplate": "%{x:.4g}<extra></extra>",
    }
    if verdict.interval_low is None or verdict.interval_high is None or verdict.value is None:
        return trace
    low, high = verdict.value - verdict.interval_low, verdict.interval_high - verdict.value
    bars = {"array": [high], "arrayminus": [low], "thickness": 1.8, "width": 6, "color": _FORM_COLOURS[verdict.form]}
    return {**trace, "error_x": bars}


def _ticks(measure: str) -> dict[str, Any]:
    if measure.endswith(_BYTES):
        return {"tickformat": "~s", "ticksuffix": "B"}
    return {"tickformat": "~s", "ticksuffix": "s"} if measure.endswith(_SECONDS) else {"tickformat": "~s"}


def number_bars(claim: Claim, verdict: Verdict) -> Figure | None:
    """Published numbers and ours as bars where at least two are in one unit; None where there are not. Bytes of ours
    stand in the unit of the published ones, GB being 1e9 bytes."""
    by_unit: dict[str, list[tuple[str, float, bool]]] = {}
    for one in claim.published:
        by_unit.setdefault(one.unit, []).append((_published_name(one), one.value, True))
    in_gigabytes = "GB" in by_unit
    for arm in verdict.arms:
        if arm.value is not None:
            unit, value = _own_unit(arm.name, arm.value, in_gigabytes=in_gigabytes)
            by_unit.setdefault(unit, []).append((arm.name, value, False))
    unit, bars = max(by_unit.items(), key=lambda item: len(item[1]), default=("", []))
    if len(bars) < 2:
        return None
    names = [escaped(clean(name)) for name, _, _ in bars]
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "y": names,
                "x": [value for _, value, _ in bars],
                "text": [
                    count_text(int(value)) if float(value).is_integer() else number(value) for _, value, _ in bars
                ],
                "textposition": "auto",
                "marker": {"color": [BASE_COLOUR if is_published else PALETTE[0] for _, _, is_published in bars]},
                "width": 0.6,
                "hovertemplate": "%{y}: %{x}<extra></extra>",
            }
        ],
        "layout": {
            "height": _FRAME_PIXELS + _ROW_PIXELS * len(bars),
            "xaxis": {"title": {"text": escaped(clean(unit or "number"))}, "tickformat": "~s" if not unit else ""},
            "yaxis": {"autorange": "reversed", "type": "category"},
            "showlegend": False,
        },
    }


def _bar_text(value: float) -> str:
    return count_text(int(value)) if float(value).is_integer() else number(value)


def _published_name(one: Published) -> str:
    return f"{one.what} (published)"


def _own_unit(name: str, value: float, *, in_gigabytes: bool) -> tuple[str, float]:
    """A term's unit by its name, such as planned(predicted_peak_allocated_bytes, lora)."""
    if not name.partition(",")[0].endswith(_BYTES):
        return "", value
    return ("GB", value / 1e9) if in_gigabytes else ("B", value)
