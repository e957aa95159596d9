"""The claims section of a study's page: verdicts and numbers are the judge's, whatever stands in the file is text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_lab.app.report_command import study_view
from lora_lab.app.study_verdicts import judge_folder
from lora_lab.record.ledger import Ledger
from lora_lab.record.registration import read_registration
from lora_lab.record.study_folder import read_study
from lora_lab.record.verdicts import begin_look
from lora_lab.report.page import draw_page
from lora_lab.schema.study import Study
from lora_lab.study.verdict import Verdict
from tests.claims_ledger import CLAIMS, claims_study, fill_claims, with_claim
from tests.page_ledger import HOSTILE
from tests.unit.test_report_page import Page


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    fill_claims(root)
    return root


def page_of(root: Path) -> Page:
    """The page of the crafted study as the ledger has it now."""
    asked = read_study(root, "crafted")
    return Page(draw_page(*study_view(Ledger(root), asked), folder=asked.folder))


def verdicts_of(root: Path, study: Study | None = None) -> dict[str, Verdict]:
    """By claim and form, as the judge gives them."""
    judged = judge_folder(root, "crafted", study or claims_study(), "pocket")
    return {f"{one.claim}|{one.form}": one for one in judged.verdicts}


def packed(text: str) -> str:
    """Without white space: elements that stand below each other have none between their texts."""
    return "".join(text.split())


def has(page: Page, *parts: str) -> bool:
    """Whether these texts stand on the page, one after the other."""
    return packed("".join(parts)) in packed(page.text)


def test_every_verdict_and_its_numbers_are_on_the_page(root: Path) -> None:
    page, verdicts = page_of(root), verdicts_of(root)
    assert {one.word for one in verdicts.values()} >= {"same direction", "contradicted", "reproduced", "not runnable"}
    for verdict in verdicts.values():
        assert has(page, verdict.sentence)
        assert verdict.would_decide is None or has(page, verdict.would_decide)
    sections = [element["id"] for element in page.all("section")]
    assert sections[0] == "claims", "at the head of the page"
    cards = [element["id"] for element in page.all("section") if str(element.get("id")).startswith("claim-")]
    assert cards == [f"claim-{claim['id']}" for claim in CLAIMS]


def test_published_numbers_stand_beside_ours_with_their_source(root: Path) -> None:
    page = page_of(root)
    assert has(page, "accuracy, all layers", "https://arxiv.org/abs/2106.09685, table 1", "53.1 %")
    assert "https://arxiv.org/abs/2106.09685" in {link["href"] for link in page.all("a")}
    arm = next(one for one in verdicts_of(root)["all_layers_better|as_published"].arms if one.name == "all8")
    assert arm.value is not None
    assert has(page, "all8", "as published", f"{arm.value:.4g} nats/token")


def test_registration_looks_and_how_to_run_it(root: Path) -> None:
    asked = read_study(root, "crafted")
    registration = judge_folder(root, "crafted", claims_study(), "pocket").registration
    assert registration is not None and asked.study is not None
    page = page_of(root)
    assert has(page, "registered", "2025-12-31 12:00 UTC", "hash of the criteria", registration.digest[:12])
    assert has(page, "looks", "1 (seeds 0, 1, 2, 3, 4 from")
    assert has(page, "run it again", "lora-lab reproduce crafted")
    assert has(page, "runs that ended before", "none of 36")


def test_runs_that_ended_before_the_registration_are_counted(tmp_path: Path) -> None:
    fill_claims(tmp_path, registered_at="2026-01-01T00:30:00.000+00:00")  # between the judged runs and the timed ones
    assert has(page_of(tmp_path), "runs that ended before", "30 of 36")


def test_the_forest_plot_shows_the_intervals_and_the_edge(root: Path) -> None:
    figure = page_of(root).blocks["figures-claim-all_layers_better"]["differences"]
    verdicts = verdicts_of(root)
    for trace, form in zip(figure["data"], ("as_published", "tuned"), strict=True):
        verdict = verdicts[f"all_layers_better|{form}"]
        assert verdict.estimate is not None
        (x,), (above,), (below,) = trace["x"], trace["error_x"]["array"], trace["error_x"]["arrayminus"]
        assert x == verdict.estimate.difference
        assert (x - below, x + above) == pytest.approx((verdict.interval_low, verdict.interval_high))
    dashed = [shape["x0"] for shape in figure["layout"]["shapes"] if shape["line"].get("dash") == "dash"]
    assert dashed == [-0.05]
    band = next(shape for shape in figure["layout"]["shapes"] if shape["type"] == "rect")
    assert band["x1"] == -0.05
    first, last = figure["layout"]["xaxis"]["range"]
    assert first == band["x0"] < -0.05 and last > 0, "no difference is on the axis"


def test_an_equality_has_both_margins(root: Path) -> None:
    shapes = page_of(root).blocks["figures-claim-ranks_equal"]
    figure = shapes.get("differences") or shapes[""]
    dashed = [shape["x0"] for shape in figure["layout"]["shapes"] if shape["line"].get("dash") == "dash"]
    assert dashed == [-0.1, 0.1]


def test_best_of_has_the_interval_that_decides_first(root: Path) -> None:
    figure = page_of(root).blocks["figures-claim-best"]["differences"]
    verdict = verdicts_of(root)["best|as_published"]
    trace = figure["data"][0]
    assert trace["y"] == ["against the best of the others", *(one.name for one in verdict.contrasts)]
    assert trace["x"][0] + trace["error_x"]["array"][0] == pytest.approx(verdict.interval_high)
    assert trace["x"][0] - trace["error_x"]["arrayminus"][0] == pytest.approx(verdict.interval_low)


def test_arms_on_two_axes_make_a_heat_map_and_targets_a_lattice(root: Path) -> None:
    figures = page_of(root).blocks["figures-claim-best"]
    scores = {arm.name: arm.value for arm in verdicts_of(root)["best|as_published"].arms}
    heat = figures["target and rank"]["data"][0]
    assert (heat["x"], heat["y"]) == (["2", "8"], ["qv", "all_linear"])
    assert heat["z"] == [[scores["qv2"], scores["qv8"]], [scores["all2"], scores["all8"]]]
    empty, full, score = figures["targets"]["data"]
    adapted = {(x, y) for x, y in zip(full["x"], full["y"], strict=True)}
    assert ("key", "all8") in adapted and ("mlp", "all2") in adapted
    assert ("key", "qv8") not in adapted and ("query", "qv8") in adapted
    assert ("key", "qv8") in set(zip(empty["x"], empty["y"], strict=True))
    assert dict(zip(score["y"], score["x"], strict=True)) == scores


def test_the_page_has_a_lattice_of_all_settings(root: Path) -> None:
    figure = page_of(root).blocks["figures-targets"]["heldout/loss"]
    assert figure["layout"]["xaxis"]["categoryarray"] == ["query", "key", "value", "projection", "mlp"]
    _, full, score = figure["data"]
    assert score["x"] == sorted(score["x"]) and len(score["x"]) == 8, "two forms of four arms, the lowest loss first"
    best = score["y"][0]
    assert {x for x, y in zip(full["x"], full["y"], strict=True) if y == best} == {
        "query",
        "key",
        "value",
        "projection",
        "mlp",
    }


def test_costs_are_bars_with_their_ratio(root: Path) -> None:
    figure = page_of(root).blocks["figures-claim-slower"][""]
    bars, ratio = figure["data"]
    assert bars["y"] == ["all8", "qv8"]
    assert bars["x"][0] / bars["x"][1] == pytest.approx(1.3, rel=0.03)
    assert ratio["x"] == pytest.approx([verdicts_of(root)["slower|as_published"].value])
    dashed = [shape["x0"] for shape in figure["layout"]["shapes"] if shape["line"].get("dash") == "dash"]
    assert dashed == [1.05]


def test_predicted_bytes_stand_in_the_published_unit(root: Path) -> None:
    bars = page_of(root).blocks["figures-claim-predicted"][""]["data"][0]
    assert bars["x"] == pytest.approx([16.62, 16.55])


def test_noise_is_split_into_its_parts(root: Path) -> None:
    estimate = verdicts_of(root)["ranks_equal|as_published"].estimate
    assert estimate is not None and estimate.seed_part is not None and estimate.example_part is not None
    share = 100 * estimate.seed_part / (estimate.seed_part + estimate.example_part)
    page = page_of(root)
    assert has(page, f"standard error {estimate.standard_error:.4g} nats/token")
    assert has(page, f"variance {estimate.seed_part:.4g}, {share:.0f} % (5 seeds)")
    assert np.isclose(estimate.seed_part + estimate.example_part, estimate.standard_error**2, rtol=0.5)


def test_runs_are_linked_and_a_deleted_one_says_so(tmp_path: Path) -> None:
    fill_claims(tmp_path)
    verdict = verdicts_of(tmp_path)["ranks_equal|as_published"]
    timed = verdicts_of(tmp_path)["slower|as_published"].arms[0].run_ids[0]
    links = {str(link["href"]) for link in page_of(tmp_path).all("a")}
    assert f"#run-{verdict.arms[0].run_ids[0]}" in links
    assert f"../../runs/{timed}/result.json" in links, "a run for the clock is no part of the page; its file is linked"
    gone = verdict.arms[0].run_ids[0]
    shutil.rmtree(tmp_path / "runs" / gone)
    page = page_of(tmp_path)
    assert has(page, f"{gone} (not in the ledger)")
    assert has(page, "Inconclusive") and has(page, f"run {gone} (qv8, seed 0) is not in the ledger")


def test_nothing_run_yet(tmp_path: Path) -> None:
    fill_claims(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    page = page_of(tmp_path)
    words = {one.word for one in verdicts_of(tmp_path).values()}
    assert words == {"not run", "contradicted", "reproduced", "not runnable"}, "arithmetic needs no run"
    assert not [key for key in page.blocks if key in ("figures-claim-best", "figures-claim-slower")]


def test_texts_of_the_file_stay_text(tmp_path: Path) -> None:
    source = {"title": HOSTILE[0], "url": "javascript:alert(1)", "notes": HOSTILE[2]}
    number = {
        "id": "a",
        "value": 1,
        "unit": HOSTILE[0],
        "what": HOSTILE[1],
        "provenance": f"https://x.org {HOSTILE[2]}",
    }
    study = with_claim(statement=HOSTILE[1], differences=HOSTILE[0], published=[number, {**number, "id": "b"}])
    study = study.model_copy(update={"source": claims_study(source=source).source})
    fill_claims(tmp_path, study)
    page = page_of(tmp_path)
    assert len(page.scripts) == 2 and not page.all("img")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert all(not str(link["href"]).startswith("javascript") for link in page.all("a"))


def test_a_study_without_claims_has_no_such_section(tmp_path: Path) -> None:
    fill_claims(tmp_path, claims_study(claims=[]))
    page = page_of(tmp_path)
    assert not [one for one in page.all("section") if one.get("id") == "claims"]
    assert "#claims" not in {link["href"] for link in page.all("a")}


def test_a_second_look_is_told(tmp_path: Path) -> None:
    fill_claims(tmp_path)
    folder = read_study(tmp_path, "crafted").folder
    registration = read_registration(folder)
    assert registration is not None
    begin_look(folder, registration.digest, "pocket", [5, 6, 7])
    page = page_of(tmp_path)
    assert has(page, "looks", "2 (seeds 0, 1, 2, 3, 4 from") and has(page, "judged here: seeds 5, 6, 7")
