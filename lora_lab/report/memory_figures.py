"""Figures about predicted memory: the course of one step, stacked by part; predicted peaks against measured ones.

In the form of `figures`: plotly's plain mappings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.plan.timeline import PARTS
from lora_lab.report.figures import Figure, escaped, missing_figure
from lora_lab.report.memory_words import part_title, percent_text
from lora_lab.report.page_settings import BASE_COLOUR, PALETTE
from lora_lab.report.text import bytes_text, clean
from lora_lab.study.memory_course import Course, Span
from lora_lab.study.predicted_memory import PeakPair

# One colour per part, in whatever figure of predicted memory it stands.
PART_COLOURS = dict(zip(PARTS, PALETTE, strict=False))
_MOST_LABELS = 24
# A phase that is narrower than this share of the step has no room for its name beside the next one's.
_NARROW = 0.12
_LINE = {"color": BASE_COLOUR, "width": 1, "dash": "dot"}
_LOG_FROM = 10.0  # largest peak divided by the smallest, from which on the axes are logarithmic


def course_figures(course: Course) -> dict[str, Figure]:
    """The same figure from 0 and, since weights may dwarf all else, above what is there at every moment; by choice."""
    lowest = [min(point.parts[index] for point in course.points) for index in range(len(PARTS))]
    return {"all": _course_figure(course, [0] * len(PARTS)), "moving": _course_figure(course, lowest)}


def _course_figure(course: Course, floors: Sequence[int]) -> Figure:
    """Live bytes above `floors` (by part) over the events of a step as a stacked area; phases, layers, peak marked."""
    x = [point.position for point in course.points]
    heights = [[point.parts[index] - floor for point in course.points] for index, floor in enumerate(floors)]
    data: list[dict[str, Any]] = [
        {
            "x": x,
            "y": values,
            "name": part_title(part),
            "stackgroup": "live",
            "mode": "lines",
            "line": {"width": 0.5, "shape": "hv", "color": PART_COLOURS[part]},
            "fillcolor": PART_COLOURS[part],
            "hovertemplate": part_title(part) + ": %{y:.4s}B<extra></extra>",
        }
        for part, values in zip(PARTS, heights, strict=True)
        if any(values)
    ]
    floor = sum(floors)
    data.append(
        {
            "x": x,
            "y": [point.total - floor for point in course.points],
            "customdata": [[str(point.place), bytes_text(point.total)] for point in course.points],
            "name": "all",
            "mode": "lines",
            "line": {"width": 0, "shape": "hv", "color": BASE_COLOUR},
            "showlegend": False,
            "hovertemplate": "<b>%{customdata[1]}</b> in %{customdata[0]}<extra></extra>",
        }
    )
    title = f"live bytes above the {bytes_text(floor)} that are always there" if floor else "live bytes"
    return {"data": [*data, _peak_mark(course, floor)], "layout": _course_layout(course, floor, title)}


def _peak_mark(course: Course, floor: int) -> dict[str, Any]:
    return {
        "x": [course.peak.position],
        "y": [course.peak.total - floor],
        "name": "peak",
        "mode": "markers",
        "marker": {"symbol": "circle-open", "size": 11, "color": BASE_COLOUR, "line": {"width": 2}},
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def _course_layout(course: Course, floor: int, title: str) -> dict[str, Any]:
    ticks = _layer_ticks(course)
    return {
        "height": 520,
        "margin": {"t": 74},
        "hovermode": "x unified",
        "xaxis": {
            "title": {"text": "operations in their order; numbers are decoder layers"},
            "range": [0, max(course.events, 1)],
            "tickmode": "array",
            "tickvals": [place for place, _ in ticks],
            "ticktext": [text for _, text in ticks],
            "tickangle": 0,
            "showgrid": False,
        },
        "yaxis": {"title": {"text": title}, "tickformat": "~s", "ticksuffix": "B", "rangemode": "tozero"},
        "legend": {"traceorder": "reversed"},
        "shapes": [
            {"type": "line", "x0": phase.first, "x1": phase.first, "y0": 0, "y1": 1, "yref": "paper", "line": _LINE}
            for phase in course.phases
        ],
        "annotations": [_peak_label(course, floor), *_phase_labels(course)],
    }


def _peak_label(course: Course, floor: int) -> dict[str, Any]:
    is_right = course.peak.position > course.events / 2
    return {
        "x": course.peak.position,
        "y": course.peak.total - floor,
        "text": f"<b>peak {bytes_text(course.peak.total)}</b>, {escaped(clean(str(course.peak.place)))}",
        "showarrow": False,
        "xanchor": "right" if is_right else "left",
        "yanchor": "bottom",
        "yshift": 6,
    }


def _phase_labels(course: Course) -> list[dict[str, Any]]:
    """Names above the plot; those of narrow phases step up, so that they stand clear of each other."""
    labels = []
    level = 0
    for phase in course.phases:
        level = level + 1 if phase.last - phase.first < _NARROW * course.events else 0
        is_last = phase.first > 0.8 * course.events
        labels.append(
            {
                "x": phase.last if is_last else phase.first,
                "y": 1,
                "yref": "paper",
                "text": escaped(clean(phase.name)),
                "showarrow": False,
                "xanchor": "right" if is_last else "left",
                "yanchor": "bottom",
                "yshift": 14 * (level % 3) + 8,
            }
        )
    return labels


def _layer_ticks(course: Course) -> list[tuple[float, str]]:
    """Position and number of layers, as many as there is room for, in the middle of each one's events."""
    layers = [span for span in course.spans if span.place.layer is not None]
    apart = max(course.events, 1) / _MOST_LABELS
    ticks: list[tuple[float, str]] = []
    for span in sorted(layers, key=_middle):
        if not ticks or _middle(span) - ticks[-1][0] >= apart:
            ticks.append((_middle(span), str(span.place.layer)))
    return ticks


def _middle(span: Span) -> float:
    return (span.first + span.last) / 2


def predicted_figure(pairs: Sequence[PeakPair], colours: Mapping[str, str]) -> Figure:
    """One point per run, measured across and predicted up; on the line the two are equal. Axes are alike, and
    logarithmic where the peaks differ by a factor of ten. colours: by setting."""
    if not pairs:
        return missing_figure("no run has both a predicted and a measured peak")
    sizes = [size for pair in pairs for size in (pair.peaks.predicted, pair.peaks.measured)]
    low, high = min(sizes), max(sizes)
    axis = {"tickformat": "~s", "ticksuffix": "B", **({"type": "log"} if low and high / low >= _LOG_FROM else {})}
    return {
        "data": [
            {
                "x": [low, high],
                "y": [low, high],
                "mode": "lines",
                "line": {"color": BASE_COLOUR, "width": 1.5, "dash": "dot"},
                "hoverinfo": "skip",
                "name": "predicted = measured",
            },
            {
                "x": [pair.peaks.measured for pair in pairs],
                "y": [pair.peaks.predicted for pair in pairs],
                "mode": "markers",
                "marker": {"size": 10, "color": [colours.get(pair.setting or "", BASE_COLOUR) for pair in pairs]},
                "customdata": [_hover(pair) for pair in pairs],
                "hovertemplate": "<b>%{customdata[0]}</b><br>predicted %{customdata[1]}<br>measured %{customdata[2]}"
                "<br>%{customdata[3]}<extra></extra>",
                "showlegend": False,
            },
        ],
        "layout": {
            "xaxis": {"title": {"text": "measured peak"}, **axis},
            "yaxis": {"title": {"text": "predicted peak"}, **axis},
            "legend": {"x": 1, "xanchor": "right", "y": 0, "yanchor": "bottom"},
        },
    }


def _hover(pair: PeakPair) -> list[str]:
    device = "" if pair.device is None else f" ({escaped(clean(pair.device))})"
    peaks = pair.peaks
    return [
        escaped(clean(pair.name)) + device,
        bytes_text(peaks.predicted),
        bytes_text(peaks.measured),
        percent_text(peaks.error),
    ]
