"""Figures hold the numbers of the study, in the units their axes name."""

from __future__ import annotations

import statistics
from pathlib import Path

import plotly.graph_objects as go
import pytest

from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.report.figures import heat_map, learning_curves, memory_bars, score_against_cost
from lora_lab.report.page_figures import families
from lora_lab.report.page_settings import colours_of
from lora_lab.study.curves import setting_curves
from lora_lab.study.findings import Findings, findings_of
from lora_lab.study.memory_parts import memory_parts
from lora_lab.study.pareto import pareto_front
from tests.page_ledger import add_run, fill
from tests.unit.ledger_samples import trial_of


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    root = tmp_path_factory.mktemp("lab")
    fill(root, ranks=[2, 8], rates=[1e-3, 2e-3, 4e-3], seeds=[0, 1, 2])
    return findings_of(Ledger(root).runs(), metrics=["heldout/loss", "skills/acc"])


def test_plotly_takes_every_figure_of_a_page(findings: Findings) -> None:
    """plotly's own validation: unknown properties raise."""
    figures = [figure for family in families(findings) for figure in family.figures.values() if "data" in figure]
    assert len(figures) >= 3 + 6 + 4 + 1
    for figure in figures:
        go.Figure(figure)


def test_heat_map_cells_are_means_of_settings(findings: Findings) -> None:
    column = findings.table.columns[0]
    (heat,) = heat_map(findings.table, findings.axes, column, "learning_rate", "rank")["data"]
    assert heat["x"] == ["0.001", "0.002", "0.004"] and heat["y"] == ["2", "8"]
    for row in findings.table.rows:
        if not row.is_base:
            x, y = heat["x"].index(str(row.axes["learning_rate"])), heat["y"].index(str(row.axes["rank"]))
            assert heat["z"][y][x] == row.cells["heldout/loss"].mean
    assert heat["reversescale"] is True, "lower is better, so the low end is the bright one"


def test_heat_map_says_over_how_many_settings(tmp_path: Path) -> None:
    for rank in (2, 8):
        for rate in (1e-3, 2e-3):
            for dropout, score in ((0.0, 1.0), (0.1, 2.0)):
                add_run(tmp_path, trial_of(rank=rank, learning_rate=rate, dropout=dropout), score=score + rank)
    found = findings_of(Ledger(tmp_path).runs(), metrics=["heldout/loss"])
    (heat,) = heat_map(found.table, found.axes, found.table.columns[0], "rank", "learning_rate")["data"]
    assert heat["z"] == [[3.5, 9.5], [3.5, 9.5]]
    assert heat["text"][0][0] == "3.50<br><i>of 2</i>"


def test_axes_without_a_common_setting_have_a_reason(findings: Findings) -> None:
    assert "missing" in heat_map(findings.table, findings.axes, findings.table.columns[0], "rank", "nothing")


def test_points_stand_at_cost_and_mean_with_their_interval(findings: Findings) -> None:
    table, column = findings.table, findings.table.columns[0]
    front = pareto_front(table, column.name, "train_seconds")
    line, points = score_against_cost(front, table, column, "train_seconds", colours_of(table))["data"]
    rows = {row.name: row for row in table.rows}
    assert len(points["x"]) == len(rows), "the base has both in this ledger"
    halves = points["error_y"]["array"]
    for label, x, y, half in zip(points["customdata"], points["x"], points["y"], halves, strict=True):
        row = rows[label[0]]
        interval = row.cells[column.name].interval
        assert (x, y) == (row.cost["train_seconds"], row.cells[column.name].mean)
        assert half == (0.0 if interval is None else interval.half_width)
    assert line["x"] == sorted(line["x"]) and line["y"] == sorted(line["y"], reverse=True)


def test_learning_curves_are_means_over_seeds_with_their_band(findings: Findings) -> None:
    rows = [row for row in findings.table.rows if not row.is_base]
    curves, missing = setting_curves(findings.records, rows, "loss")
    figure = learning_curves(curves, colours_of(findings.table), title="loss")
    band, mean = figure["data"][:2]
    scores = [point.value for point in rows[0].cells["heldout/loss"].points]
    first = statistics.fmean(scores) + 3 * 2.718281828459045 ** (-4 / 12)
    assert not missing
    assert mean["y"][0] == pytest.approx(first)
    assert len(band["x"]) == 2 * len(mean["x"])
    upper, lower = band["y"][: len(mean["y"])], band["y"][: len(mean["y"]) - 1 : -1]
    assert all(low <= middle <= high for low, middle, high in zip(lower, mean["y"], upper, strict=True))


def test_a_setting_without_a_completed_run_is_drawn_run_by_run(tmp_path: Path) -> None:
    add_run(tmp_path, trial_of(), status=Status.DIVERGED, reason="NaN", steps=5)
    found = findings_of(Ledger(tmp_path).runs(), metrics=None)
    curves, _ = setting_curves(found.records, found.table.rows, "loss")
    (line,) = learning_curves(curves, colours_of(found.table), title="loss")["data"]
    assert line["name"].endswith("(DIVERGED)") and line["x"] == [1, 2, 3, 4, 5]


def test_bars_add_up_to_the_peak(findings: Findings) -> None:
    parts = [one for row in findings.table.rows if (one := memory_parts(findings.records, row)) is not None]
    figure = memory_bars(parts)
    for index, one in enumerate(parts):
        assert sum(bar["x"][index] for bar in figure["data"]) == one.peak_bytes
