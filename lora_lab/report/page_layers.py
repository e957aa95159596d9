"""What the page says of layers, experts and routers: on the page of a run, and of settings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_lab.record.run_record import RunRecord
from lora_lab.report.figures import Figure, missing_figure
from lora_lab.report.layer_figures import distances_figure, norms_figure, unchanged_places
from lora_lab.report.page_settings import (
    SETTING_DIGITS,
    colours_of,
    heading,
    metric_cell,
    plain_cell,
    scale_of,
)
from lora_lab.report.routing_figures import entropy_figure, load_figure, tasks_figure
from lora_lab.report.text import clean, number_text
from lora_lab.study.cells import Point
from lora_lab.study.findings import Findings
from lora_lab.study.layers import ExpertDistances, expert_distances, layer_norms
from lora_lab.study.rank_correlation import RankCorrelation
from lora_lab.study.routing import (
    Control,
    RoutingAtEvaluation,
    RoutingRow,
    has_routers,
    routing_at_evaluation,
    routing_in_training,
    routing_rows,
)
from lora_lab.study.settings import is_base

_TITLES = {"relative_entropy": "relative entropy", "top2_mass": "top-2 mass"}
_SIDE_TITLES = {"trained": "trained on", "untrained": "not trained on"}
_P_TITLES = {"trained": "p, trained on", "all": "p, all"}
_LEGEND = (
    "Routers at evaluation, on a sample of the held-out rows and of each task; means over routers and labels. "
    "Relative entropy: 1 where no expert is preferred, 0 where one takes all. Top-2 mass: probability of the two most "
    "probable experts. p: how often routing differs as much between labels that were shuffled over the sequences; one "
    "per seed, since p values have no mean."
)
_MOST_P_VALUES = 5
_TOO_MANY = "left out of a page of so many runs; layers.jsonl has it"


def layer_sections(record: RunRecord, *, with_loads: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Sections of a run's own page (title, lead, figure, notes), and by title why others are not there.

    Nothing of either for an untouched base and for a run whose configuration cannot be read; routers of mixtures alone.
    with_loads: whether the largest figure is drawn, one number per layer, kind of module and expert.
    """
    if record.header is None or is_base(record.trial):
        return [], {}
    drawn = [_norms(record), *(_mixture(record, with_loads=with_loads) if has_routers(record) else ())]
    missing = {str(one["title"]).lower(): str(one["figure"]["missing"]) for one in drawn if "missing" in one["figure"]}
    return [one for one in drawn if "data" in one["figure"]], missing


def _section(title: str, lead: str, figure: Figure, notes: Sequence[str] = ()) -> dict[str, Any]:
    return {"title": title, "lead": lead, "figure": figure, "notes": list(notes)}


def _norms(record: RunRecord) -> dict[str, Any]:
    norms = layer_norms(record)
    still = unchanged_places(norms)
    return _section(
        "Weights by layer",
        "Frobenius norm of all weights of a layer, and of their change since the start of the training.",
        norms_figure(norms),
        [f"Not changed, so without a point: {clean(', '.join(still))}."] if still else [],
    )


def _mixture(record: RunRecord, *, with_loads: bool) -> list[dict[str, Any]]:
    training, evaluation = routing_in_training(record), routing_at_evaluation(record)
    distances = expert_distances(record)
    step = f" at step {training.steps[-1]}" if training.steps else ""
    return [
        _section(
            "Load of the experts",
            f"Share of the weight that each expert has{step}, as a multiple of an even share. Columns are experts.",
            load_figure(training) if with_loads else missing_figure(_TOO_MANY),
        ),
        _section(
            "Entropy of the routers",
            "Mean over the layers of the entropy of the routing probabilities, divided by that of an even choice.",
            entropy_figure(training),
        ),
        _section(
            "Load by task",
            "The same share after training, by task and held-out label, as a mean over all routers.",
            tasks_figure(evaluation),
            control_sentences(evaluation),
        ),
        _section(
            "Distance between experts",
            f"Mean distance between two experts of a layer{_at(distances)}, with Spearman's rho against the layer.",
            distances_figure(distances),
            [_trend_sentence(distances.trend)] if distances.missing is None else [],
        ),
    ]


def _at(distances: ExpertDistances) -> str:
    return "" if distances.step is None else f" at step {distances.step}"


def _trend_sentence(trend: RankCorrelation | None) -> str:
    if trend is None:
        return "Too few layers with a distance, or all alike: there is no trend over the layers."
    direction = "grows with depth" if trend.rho > 0 else "shrinks with depth" if trend.rho < 0 else "keeps no order"
    sure = "" if trend.p_value < 0.05 else ", which chance explains as well"
    return (
        f"The mean over the kinds of modules {direction}{sure}: rho = {trend.rho:.2f}, p {_p(trend.p_value)} over "
        f"{trend.n} layers."
    )


def control_sentences(evaluation: RoutingAtEvaluation) -> list[str]:
    """What the shuffled labels say: one sentence about the labels that were trained on, one about all."""
    if evaluation.missing is not None:
        return []
    sides: list[tuple[str, Control | None]] = [("that were trained on", evaluation.trained)]
    if any(not one.trained for one in evaluation.labels):
        sides.append(("in all", evaluation.all))
    return [_control(which, control) for which, control in sides]


def _control(which: str, control: Control | None) -> str:
    if control is None:
        return f"There are fewer than two labels {which}, so routing cannot differ between them."
    verdict = "follows them further than chance" if control.p_value < 0.05 else "follows them no further than chance"
    return (
        f"With the {control.labels} labels {which}, routing {verdict}: variance between labels "
        f"{number_text(control.statistic)}, with labels shuffled over the sequences "
        f"{number_text(control.shuffled_mean)} on average and {number_text(control.shuffled_quantile_95)} at the 95 % "
        f"quantile (p {_p(control.p_value)}, {control.permutations} shuffles)."
    )


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}"


def routing_view(findings: Findings) -> dict[str, Any]:
    """The table of settings with routers, in the form of the table of settings; no rows where there is none."""
    rows = routing_rows(findings.records, findings.table)
    keys = list(rows[0].cells) if rows else []
    scales = {key: scale_of([row.cells[key] for row in rows]) for key in keys}
    colours = colours_of(findings.table)
    return {
        "columns": [
            heading("seeds", "", "completed runs whose routers were looked at"),
            *(heading(f"{_TITLES[measure]}, {_SIDE_TITLES[side]}", "", "") for measure, side in keys),
            *(heading(title, "", "of the control by shuffled labels") for title in _P_TITLES.values()),
        ],
        "rows": [
            {
                "id": row.setting[:SETTING_DIGITS],
                "name": clean(row.name),
                "is_base": False,
                "colour": colours[row.setting],
                "cells": [
                    _seeds(row),
                    *(metric_cell(row.cells[key], scales[key], is_best=False) for key in keys),
                    *(_p_cell(row.p_values[side]) for side in _P_TITLES),
                ],
            }
            for row in rows
        ],
        "legend": _LEGEND,
        "notes": [],
    }


def _seeds(row: RoutingRow) -> dict[str, Any]:
    count = max((len(cell.points) for cell in row.cells.values()), default=0)
    return plain_cell(str(count), count)


def _p_cell(points: Sequence[Point]) -> dict[str, Any]:
    """Every seed's p value, of many the range; sorted by the largest."""
    if not points:
        return plain_cell("-", None, hint="fewer than two labels, or not measured", is_missing=True)
    values = [point.value for point in points]
    shown = values if len(values) <= _MOST_P_VALUES else [min(values), max(values)]
    text = (", " if shown is values else " to ").join(f"{value:.2g}" for value in shown)
    return plain_cell(text, max(values), hint=f"{len(values)} seeds")
