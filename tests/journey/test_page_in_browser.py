"""The page in a real browser: what its script makes of the data, at two widths. Skipped where there is no Chromium."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lora_lab.app.cli import main
from lora_lab.report.memory_page import write_memory_page
from tests.browser import BROWSER
from tests.claims_ledger import CLAIMS, fill_claims
from tests.page_ledger import HOSTILE, add_cohort, add_routed_run, add_run, fill, fill_hostile
from tests.tiers import mostly_slow
from tests.unit.ledger_samples import trial_of
from tests.unit.test_report_page import Page
from tests.unit.timeline_samples import peak_of, prediction_of_parts, step_of

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def opened(path: Path, fragment: str = "", *, width: int = 1400) -> tuple[Page, str]:
    """The document after its scripts have run, and what the console said."""
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={path.parent / 'profile'}",
            f"--window-size={width},4000",
            "--virtual-time-budget=8000",
            "--dump-dom",
            f"file://{path}{fragment}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return Page(done.stdout), console


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a ledger with two axes."""
    root = tmp_path_factory.mktemp("lab")
    fill(root, ranks=[2, 8], rates=[1e-3, 2e-3], seeds=[0, 1, 2])
    assert main(["report", "--root", str(root)]) == 0
    return root / "report.html"


@pytest.mark.parametrize("width", mostly_slow([1400, 500], keep=[1400]))
def test_every_figure_is_drawn_and_nothing_is_complained_of(page: Path, width: int) -> None:
    document, console = opened(page, width=width)
    assert console == ""
    plots = [element for element in document.all("div") if "js-plotly-plot" in str(element.get("class"))]
    assert len(plots) == 4, "curves, cost, two axes, memory"
    assert document.text.count("learning_rate") >= 2


@pytest.mark.parametrize("width", [1400, 500])
def test_claims_are_drawn(tmp_path: Path, width: int) -> None:
    fill_claims(tmp_path)
    assert main(["report", "crafted", "--root", str(tmp_path)]) == 0
    document, console = opened(tmp_path / "studies" / "crafted" / "report.html", width=width)
    assert console == ""
    cards = [one for one in document.all("section") if str(one.get("class")).startswith("claim")]
    assert len(cards) == len(CLAIMS)
    plots = [one for one in document.all("div") if "js-plotly-plot" in str(one.get("class"))]
    drawn = {str(one.get("aria-label")) for one in plots}
    assert "Figure of all_layers_better" in drawn, "the first is in view, others are drawn when they come into it"
    assert "Known differences from the source" in document.text


def test_the_page_of_a_run(page: Path) -> None:
    run_id = re.findall(r'id="run-data-([0-9a-f]+)"', page.read_text())[3]
    document, console = opened(page, f"#run-{run_id}")
    assert console == ""
    assert run_id in document.text and "Sample answers" in document.text
    links = [str(link["href"]) for link in document.all("a") if str(link["href"]).startswith("runs/")]
    assert f"runs/{run_id}/result.json" in links
    assert all((page.parent / link).is_file() for link in links)
    assert any("js-plotly-plot" in str(element.get("class")) for element in document.all("div"))


@pytest.mark.parametrize("width", mostly_slow([1400, 500], keep=[500]))
def test_the_page_of_a_mixture(tmp_path: Path, width: int) -> None:
    record = add_routed_run(tmp_path)
    assert main(["report", "--root", str(tmp_path)]) == 0
    document, console = opened(tmp_path / "report.html", f"#run-{record.run_id}", width=width)
    assert console == ""
    plots = [element for element in document.all("div") if "js-plotly-plot" in str(element.get("class"))]
    assert [plot.get("aria-label") for plot in plots if plot.get("aria-label")] == [
        "Weights by layer",
        "Load of the experts",
        "Entropy of the routers",
        "Load by task",
        "Distance between experts",
    ]
    for text in ("load balancing loss", "gate_proj", "not trained on", "further than chance"):
        assert text in document.text


def test_the_page_of_a_setting(page: Path) -> None:
    setting = re.findall(r'href="#setting-([0-9a-f]+)"', page.read_text())[-1]
    document, console = opened(page, f"#setting-{setting}")
    assert console == ""
    assert "Mean over seeds" in document.text and "What sets it apart" in document.text
    assert "[object" not in document.text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 500])
def test_the_page_of_runs_that_were_trained_together(tmp_path: Path, width: int) -> None:
    """Beside some that were alone: the cohort's section, the reasons on a setting's page, a member's own page."""
    trials = [trial_of(rank=rank, seed=seed) for rank in (2, 4) for seed in (0, 1)]
    records = add_cohort(tmp_path, "5f0c", trials, seats=3, on_cpu=False)
    for seed in (0, 1):
        add_run(tmp_path, trial_of(rank=8, seed=seed))
    assert main(["report", "--root", str(tmp_path)]) == 0
    path = tmp_path / "report.html"
    document, console = opened(path, width=width)
    assert console == ""
    assert "Runs of cohort 5f0c" in document.text and "2 of 3 settings have none among their 4 runs" in document.text
    links = [str(link["href"]) for link in document.all("a") if str(link["href"]).startswith("#run-")]
    assert {f"#run-{record.run_id}" for record in records} <= set(links)
    setting, console = opened(path, f"#setting-{str(records[0].setting)[:12]}", width=width)
    assert console == "" and "No train time: no run was executed alone" in setting.text
    reasons = [str(span.get("title")) for span in setting.all("span") if span.get("title")]
    assert sum("trained in cohort 5f0c with 3 others" in reason for reason in reasons) == 2 * 3
    member, console = opened(path, f"#run-{records[0].run_id}", width=width)
    assert console == "" and "in cohort 5f0c of 3 seats, together with 3 others" in member.text
    assert "cohort train seconds" in member.text


@pytest.mark.parametrize("width", mostly_slow([1400, 500], keep=[500]))
def test_predicted_against_measured_memory(tmp_path: Path, width: int) -> None:
    prediction = prediction_of_parts({"weights": 540_000_000, "activations": 360_000_000})
    facts = {"executed": "alone", "warnings": [], "prediction": prediction.to_json()}
    record = add_run(tmp_path, trial_of(), predicted_peak_allocated_bytes=900_000_000, facts=facts)
    assert main(["report", "--root", str(tmp_path)]) == 0
    document, console = opened(tmp_path / "report.html", width=width)
    assert console == ""
    drawn = [str(one.get("aria-label")) for one in document.all("div") if "js-plotly-plot" in str(one.get("class"))]
    assert "Predicted against measured memory" in drawn
    run, console = opened(tmp_path / "report.html", f"#run-{record.run_id}", width=width)
    assert console == "" and "Predicted 900 MB, measured 900 MB, -0.01 %." in run.text
    assert "gradients, activations, temporary" in run.text and "[object" not in run.text


@pytest.mark.parametrize("width", mostly_slow([1400, 500], keep=[500]))
def test_the_page_of_a_predicted_peak(tmp_path: Path, width: int) -> None:
    path = tmp_path / "memory.html"
    write_memory_page(step_of(6), prediction_of_parts(peak_of(6)), path, title="lora-r8")
    document, console = opened(path, width=width)
    assert console == ""
    (plot,) = (element for element in document.all("div") if "js-plotly-plot" in str(element.get("class")))
    assert plot["aria-label"] == "Memory over one step"
    assert document.text.count("peak 1.74 kB") == 1 and "forward, layers 0 to 5" in document.text


def test_an_address_that_leads_nowhere(page: Path) -> None:
    document, console = opened(page, "#run-<script>")
    assert console == ""
    assert "This page holds no run <script>." in document.text


def test_hostile_texts_do_nothing(tmp_path: Path) -> None:
    fill_hostile(tmp_path)
    assert main(["report", "--root", str(tmp_path)]) == 0
    path = tmp_path / "report.html"
    for fragment in ["", *(f"#run-{one}" for one in re.findall(r'id="run-data-([0-9a-f]+)"', path.read_text())[:1])]:
        document, console = opened(path, fragment)
        assert console == "", "not even an attempt that the content security policy had to stop"
        assert all("data-owned" not in attributes for attributes in document.all("html"))
    assert any(text in document.text for text in HOSTILE)
