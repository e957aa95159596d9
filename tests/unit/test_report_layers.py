"""What the page says of layers and routers: the study's numbers, panels that fit, reasons where nothing was seen."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from lora_lab.report.layer_figures import distances_figure, norms_figure, unchanged_places
from lora_lab.report.page_layers import control_sentences, layer_sections, routing_view
from lora_lab.report.routing_figures import entropy_figure, load_figure, tasks_figure
from lora_lab.report.text import cell_text
from lora_lab.study.findings import findings_of
from lora_lab.study.layers import LayerNorms, NormsAt, expert_distances, layer_norms
from lora_lab.study.routing import (
    Control,
    RoutingAtEvaluation,
    RoutingInTraining,
    routing_at_evaluation,
    routing_in_training,
    routing_rows,
)
from tests.page_ledger import HOSTILE, add_routed_run, add_run
from tests.unit.ledger_samples import trial_of
from tests.unit.test_report_page import drawn

TITLES = ["Weights by layer", "Load of the experts", "Entropy of the routers", "Load by task"]
TITLES += ["Distance between experts"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    for seed in (0, 1, 2):
        add_routed_run(root, seed=seed)
    add_run(root, trial_of())
    return root


@pytest.fixture(scope="module")
def record(root: Path) -> RunRecord:
    return next(one for one in Ledger(root).runs() if one.trial["method"]["kind"] == "mola")


def test_plotly_takes_every_figure(record: RunRecord) -> None:
    sections, missing = layer_sections(record, with_loads=True)
    assert [one["title"] for one in sections] == TITLES and missing == {}
    for one in sections:
        go.Figure(one["figure"])


def norms_of(*observations: NormsAt) -> LayerNorms:
    return LayerNorms(("embedding", "0", "1", "2", "final_norm", "head"), observations, None)


def test_norms_stand_at_their_layer_and_what_did_not_change_has_no_point() -> None:
    weight = (300.0, 10.0, 11.0, 12.0, 5.0, None)
    first = NormsAt(25, weight, (0.0, 0.5, 0.25, 0.0, 0.0, None))
    last = NormsAt(100, weight, (0.0, 1.23456, 0.5, 0.0, 0.0, None))
    figure = norms_figure(norms_of(first, last))
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert [trace["name"] for trace in figure["data"]] == ["change, step 25", "weights, step 100", "change, step 100"]
    _, weights, change = figure["data"]
    places = dict(zip(weights["x"], weights["y"], strict=True))
    assert (places[-2], places[0], places[1], places[2], places[4]) == (300.0, 10.0, 11.0, 12.0, 5.0)
    assert places[-0.5] is None and places[3.5] is None, "no line from the embedding to the first layer"
    assert change["y"][change["x"].index(0)] == 1.235, "four digits"
    assert change["y"][change["x"].index(2)] is None
    ticks = dict(zip(figure["layout"]["xaxis"]["tickvals"], figure["layout"]["xaxis"]["ticktext"], strict=True))
    assert ticks == {-2: "embed", 0: "0", 1: "1", 2: "2", 4: "norm", 6: "head"}
    assert unchanged_places(norms_of(first, last)) == ["layer 2", "embedding", "final norm"]


def test_weights_are_drawn_twice_only_where_they_moved() -> None:
    moved = NormsAt(100, (300.0, 10.5, 11.0, 12.0, 5.0, 9.0), (None,) * 6)
    figure = norms_figure(norms_of(NormsAt(25, (300.0, 10.0, 11.0, 12.0, 5.0, 9.0), (None,) * 6), moved))
    assert [trace["name"] for trace in figure["data"]] == ["weights, step 25", "weights, step 100"]
    assert [trace["name"] for trace in norms_figure(norms_of(moved))["data"]] == ["weights, step 100"]
    nothing = NormsAt(100, (None,) * 6, (0.0,) * 6)
    assert norms_figure(norms_of(nothing)) == {"missing": "every norm is 0 or was not finite"}


def test_a_range_of_layers_is_told_in_short() -> None:
    places = tuple(map(str, range(6)))
    norms = LayerNorms(places, (NormsAt(5, (1.0,) * 6, (0.0, 0.0, 1.0, 0.0, 1.0, 0.0)),), None)
    assert unchanged_places(norms) == ["layers 0 to 1", "layer 3", "layer 5"]


def test_loads_are_multiples_of_an_even_share_whatever_the_number_of_experts(record: RunRecord) -> None:
    """Layers of 2, 3 and 4 experts: a panel per kind of module, rows that end where the experts do."""
    training = routing_in_training(record)
    figure = load_figure(training)
    assert len(figure["data"]) == len(training.loads) == 7
    ends = []
    for index, (kind, trace) in enumerate(zip(training.loads, figure["data"], strict=True)):
        for layer, experts in enumerate((2, 3, 4)):
            load = training.loads[kind][layer]
            assert load is not None and len(load) == experts
            row = trace["z"][layer]
            assert row == [*(pytest.approx(share * experts, rel=1e-3) for share in load), *[None] * (4 - experts)]
            assert sum(row[:experts]) == pytest.approx(experts, rel=1e-3)
        axis = figure["layout"]["xaxis" + (str(index + 1) if index else "")]
        assert trace["xaxis"] == "x" + (str(index + 1) if index else "")
        assert axis["ticktext"] == [kind]
        ends.append(tuple(axis["domain"]))
    assert ends[0][0] == 0 and ends[-1][1] == pytest.approx(1)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ends)), "side by side, with gaps"


@pytest.mark.parametrize(
    ("load", "low", "high"),
    [((0.5, 0.5), 0.75, 1.25), ((0.3, 0.7), 0.6, 1.4), ((1.0, 0.0, 0.0, 0.0), 0.0, 4.0)],
)
def test_an_even_share_has_the_same_colour_everywhere(load: tuple[float, ...], low: float, high: float) -> None:
    training = RoutingInTraining((5,), {"c_fc": (0.5,)}, (0,), {"c_fc": (load,)}, None)
    colours = load_figure(training)["layout"]["coloraxis"]
    assert (colours["cmin"], colours["cmax"]) == (pytest.approx(low), pytest.approx(high))
    place, colour = colours["colorscale"][1]
    assert low + place * (high - low) == pytest.approx(1) and colour == "#C5CAD0"


def test_entropy_is_a_line_per_kind_of_module(record: RunRecord) -> None:
    training = routing_in_training(record)
    figure = entropy_figure(training)
    for kind, trace in zip(training.relative_entropy, figure["data"], strict=True):
        assert trace["name"] == kind and trace["x"] == [3, 6, 9, 12]
        assert trace["y"] == [pytest.approx(value, rel=1e-3) for value in training.relative_entropy[kind]]
    assert figure["layout"]["yaxis"]["range"][0] == 0


def test_trained_and_other_tasks_stand_below_their_headings(record: RunRecord) -> None:
    evaluation = routing_at_evaluation(record)
    figure = tasks_figure(evaluation)
    titles = figure["layout"]["yaxis"]["ticktext"]
    assert titles == [
        *("<b>trained on</b>", "copy", "add", "skills_trained"),
        *("<b>not trained on</b>", "skills_unseen", "prose"),
    ]
    assert [trace["x"] for trace in figure["data"]] == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    labels = {one.label: one for one in evaluation.labels}
    for trace, experts in zip(figure["data"], (2, 3, 4), strict=True):
        for title, row, told in zip(titles, trace["z"], trace["customdata"], strict=True):
            if title in labels:
                assert row == [pytest.approx(share * experts, rel=1e-3) for share in labels[title].loads[experts]]
                assert told[0].startswith(title)
            else:
                assert row == [None] * experts, "a heading has no cells"
        assert trace["texttemplate"], "nine columns have room for numbers"


def test_distances_have_their_trend_beside_their_name(tmp_path: Path) -> None:
    record = add_routed_run(tmp_path, experts=[1] * 3 + [2] * 9, kinds={"mlp": ["up_proj"]})
    distances = expert_distances(record)
    (line,) = distances_figure(distances)["data"]
    trend = distances.trends["up_proj"]
    assert trend is not None and trend.n == 9, "single experts have no distance"
    assert line["name"] == f"up_proj: rho = {trend.rho:.2f}"
    assert line["y"][:3] == [None] * 3 and None not in line["y"][3:]
    sections, _ = layer_sections(record, with_loads=True)
    assert sections[-1]["notes"] == [
        f"The mean over the kinds of modules grows with depth: rho = {trend.rho:.2f}, p = {trend.p_value:.2g} over 9 "
        "layers."
    ]


def test_a_trend_that_chance_explains_is_said_to_be_that(tmp_path: Path) -> None:
    record = add_routed_run(tmp_path, experts=[2, 2, 2], kinds={"mlp": ["up_proj"]}, seed=4)
    sections, _ = layer_sections(record, with_loads=True)
    (note,) = sections[-1]["notes"]
    assert "which chance explains as well" in note, "no three layers can do better than p = 1/3"


def evaluation_of(trained: Control | None, every: Control | None, record: RunRecord) -> RoutingAtEvaluation:
    return RoutingAtEvaluation(routing_at_evaluation(record).labels, trained, every, None)


def test_the_control_is_a_sentence_no_surer_than_its_p_value(record: RunRecord) -> None:
    clear = Control(3, 0.0041, 0.0013, 0.0019, 0.001, 999)
    chance = Control(5, 0.0014, 0.0013, 0.0019, 0.38, 999)
    first, second = control_sentences(evaluation_of(clear, chance, record))
    assert first == (
        "With the 3 labels that were trained on, routing follows them further than chance: variance between labels "
        "0.00410, with labels shuffled over the sequences 0.00130 on average and 0.00190 at the 95 % quantile "
        "(p = 0.001, 999 shuffles)."
    )
    assert second.startswith("With the 5 labels in all, routing follows them no further than chance: ")
    (alone, _) = control_sentences(evaluation_of(None, chance, record))
    assert alone == "There are fewer than two labels that were trained on, so routing cannot differ between them."


def test_where_nothing_was_measured_the_reason_is_among_the_missing(root: Path, tmp_path: Path) -> None:
    page, _, _ = drawn(root)
    plain = next(block for key, block in page.blocks.items() if block.get("name", "").startswith("lora"))
    assert plain["layers"] == [] and ["weights by layer", "the layer log holds no norms"] in plain["missing"]
    add_run(tmp_path, trial_of(method={"kind": "molora", "experts": 4}))
    page, _, _ = drawn(tmp_path)
    (mixture,) = (block for key, block in page.blocks.items() if key.startswith("run-data-"))
    assert mixture["layers"] == []
    assert dict(mixture["missing"]) == {
        "weights by layer": "the layer log holds no norms",
        "load of the experts": "the layer log holds no routing",
        "entropy of the routers": "the layer log holds no routing",
        "load by task": "its routers were not looked at when it was scored",
        "distance between experts": "the layer log holds no experts",
    }


def test_an_untouched_base_has_no_such_section(tmp_path: Path) -> None:
    base = add_run(tmp_path, trial_of(method={"kind": "base"}), steps=0)
    assert layer_sections(base, with_loads=True) == ([], {})


def test_a_page_of_many_runs_leaves_the_loads_out(record: RunRecord) -> None:
    sections, missing = layer_sections(record, with_loads=False)
    assert [one["title"] for one in sections] == [title for title in TITLES if title != "Load of the experts"]
    assert list(missing) == ["load of the experts"]


def test_a_mixture_of_many_layers_stays_small(tmp_path: Path) -> None:
    record = add_routed_run(tmp_path, experts=[8] * 30)
    sections, _ = layer_sections(record, with_loads=True)
    assert len(json.dumps(sections, separators=(",", ":"))) < 40_000, "1,680 loads and all the rest"


def test_auxiliary_losses_are_curves_of_their_own(root: Path, record: RunRecord) -> None:
    page, _, _ = drawn(root)
    curves = page.blocks[f"run-data-{record.run_id}"]["curves"]["values"]
    assert list(curves)[:2] == ["loss", "load_balancing_loss"]
    assert curves["load_balancing_loss"]["y"] == [pytest.approx(1.5 / step, rel=1e-4) for step in range(1, 13)]
    assert curves["load_balancing_loss"]["unit"] == "loss, before its weight"
    plain = next(block for key, block in page.blocks.items() if block.get("name", "").startswith("lora"))
    assert "load_balancing_loss" not in plain["curves"]["values"]


def test_settings_with_routers_side_by_side(root: Path) -> None:
    page, findings, _ = drawn(root)
    (row,) = routing_rows(findings.records, findings.table)
    view = routing_view(findings)
    (shown,) = view["rows"]
    assert shown["name"].startswith("mola") and len(shown["cells"]) == len(view["columns"]) == 7
    assert [cell["text"] for cell in shown["cells"]] == [
        "3",
        *(cell_text(cell) for cell in row.cells.values()),
        "0.001, 0.001, 0.001",
        "0.002, 0.004, 0.006",
    ]
    assert [cell["mark"] is not None for cell in shown["cells"]] == [False, True, True, True, True, False, False]
    assert {"href": "#routing"} in page.all("a")
    for cell in shown["cells"]:
        assert cell["text"] in page.text


def test_many_p_values_are_told_as_a_range(tmp_path: Path) -> None:
    for seed in range(6):
        add_routed_run(tmp_path, seed=seed, experts=[2, 2], kinds={"mlp": ["up_proj"]})
    (row,) = routing_view(findings_of(Ledger(tmp_path).runs(), metrics=None))["rows"]
    assert row["cells"][-1]["text"] == "0.002 to 0.012" and row["cells"][-1]["sort"] == 0.012


def test_without_mixtures_there_is_no_such_table(tmp_path: Path) -> None:
    add_run(tmp_path, trial_of())
    page, _, _ = drawn(tmp_path)
    assert {"href": "#routing"} not in page.all("a") and "Relative entropy" not in page.text


def test_hostile_names_of_tasks_and_modules_stay_text(tmp_path: Path) -> None:
    hostile: list[str] = [text for text in HOSTILE if "\x1b" not in text]
    record = add_routed_run(tmp_path, labels=hostile, kinds={"mlp": ["<b>%{x}</b>"]}, experts=[2, 2])
    page, _, text = drawn(tmp_path)
    assert len(page.scripts) == 2 and "dataset.owned=1</script" not in text
    sections: list[dict[str, Any]] = page.blocks[f"run-data-{record.run_id}"]["layers"]
    assert len(sections) == 5
    figures = json.dumps([one["figure"] for one in sections])
    assert "<script" not in figures and "&lt;b&gt;% {x}" in figures


def test_norms_of_a_run_are_those_of_its_log(record: RunRecord) -> None:
    norms = layer_norms(record)
    figure = norms_figure(norms)
    change = figure["data"][-1]
    last = dict(zip(norms.places, norms.observations[-1].update, strict=True))
    for layer in range(3):
        assert change["y"][change["x"].index(layer)] == pytest.approx(last[str(layer)], rel=1e-3)
