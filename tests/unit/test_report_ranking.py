"""The page's ranking shows the study's ranks, says what was chosen on what, and marks a best rate at the edge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lora_lab.app.report_command import main
from lora_lab.record.result import Status
from lora_lab.report.page_ranking import ranking_view
from lora_lab.report.text import cell_text
from tests.page_ledger import add_run, fill
from tests.unit.ledger_samples import trial_of
from tests.unit.test_report_page import drawn

CHOSEN = "The best rate was chosen on the runs that are shown, so small leads are flattered; times are of this machine"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 8 is better than rank 2, both best at the middle rate; rank 4 at its largest; rank 99 diverged."""
    root = tmp_path_factory.mktemp("lab")
    fill(root, ranks=[2, 8], rates=[1e-3, 2e-3, 4e-3], seeds=[0, 1, 2])
    for rate, score in {1e-3: 4.0, 2e-3: 3.0}.items():
        for seed in (0, 1, 2):
            trial = trial_of(rank=4, alpha=8.0, learning_rate=rate, seed=seed)
            add_run(root, trial, score=score + 0.01 * seed)
    add_run(root, trial_of(rank=99, learning_rate=9.0), status=Status.DIVERGED, reason="step 3: loss NaN")
    return root


def test_rows_are_the_contenders_by_rank(ledger: Path) -> None:
    page, findings, text = drawn(ledger, metrics=["heldout/loss"])
    view = ranking_view(findings)
    titles = [column["title"] for column in view["columns"]]
    rows = [[row["name"], *(cell["text"] for cell in row["cells"])] for row in view["rows"]]
    assert titles[:4] == ["rank", "heldout/loss", "against the first", "best rate"]
    scores = [cell_text(one.score) for one in findings.ranking.contenders]
    assert [row[:5] for row in rows] == [
        ["lora-r8", "1", scores[0], "first", "0.002 of 3"],
        ["lora-r2", "2", scores[1], "behind", "0.002 of 3"],
        ["lora-r4", "3", "3.01 ± 0.02", "behind", "0.002 of 2, edge"],
        ["lora-r99", "-", "-", "-", "none of 1"],
        ["base", "-", "4.90", "-", "-"],
    ]
    # bytes 900,000,000 + 16,000 rank; seconds 10 + 0.1 rank, of every seed the same
    assert [row[5:] for row in rows[:3]] == [
        ["3", "900 MB", "3", "10.80 ± 0", "8,000"],
        ["1", "900 MB", "1", "10.20 ± 0", "2,000"],
        ["2", "900 MB", "2", "10.40 ± 0", "4,000"],
    ]
    section = text[text.index('<section id="ranking">') :].partition("</section>")[0]
    assert re.findall(r'<th scope="row" data-sort="([^"]*)"', section) == [row[0] for row in rows]
    assert {"href": "#ranking"} in page.all("a")


def test_what_the_table_owes_its_reader(ledger: Path) -> None:
    page, findings, _ = drawn(ledger, metrics=["heldout/loss"])
    assert CHOSEN in page.text
    assert "Best rate at the edge of its grid, so a better one may lie beyond it: lora-r4." in page.text
    assert "Not ranked: lora-r99: no score." in page.text
    assert f"(Bonferroni), {findings.ranking.comparisons}; every rate counts as one." in page.text
    assert findings.ranking.comparisons == 8, "eight settings have a score: one against seven, and the base"


def test_without_a_sweep_of_rates_nothing_is_said_of_them(tmp_path: Path) -> None:
    fill(tmp_path, ranks=[2, 8], rates=[1e-3], seeds=[0, 1, 2])
    page, findings, _ = drawn(tmp_path)
    assert "best rate" not in [column["title"] for column in ranking_view(findings)["columns"]]
    assert "was chosen on the runs" not in page.text and "Times are of this machine" in page.text


def test_no_section_before_a_score(tmp_path: Path) -> None:
    add_run(tmp_path, trial_of(), status=Status.FAILED, reason="x")
    _, _, text = drawn(tmp_path)
    assert 'id="ranking"' not in text


def test_memory_with_its_range_where_seeds_differ(tmp_path: Path) -> None:
    for seed, peak in enumerate([1_000_000, 3_000_000, 2_000_000]):
        add_run(tmp_path, trial_of(seed=seed), measurements={"peak_allocated_bytes": peak})
    _, findings, _ = drawn(tmp_path)
    cells = [cell["text"] for cell in ranking_view(findings)["rows"][0]["cells"]]
    assert cells[3:] == ["1", "1.00 to 3.00 MB", "-", "-", "8,000"]


def test_the_report_as_data_has_the_ranks(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json", "--root", str(ledger)]) == 0
    told = json.loads(capsys.readouterr().out)["ranking"]["contenders"]
    assert [(one["name"], one["score_rank"]) for one in told] == [
        ("lora-r8", 1),
        ("lora-r2", 2),
        ("lora-r4", 3),
        ("lora-r99", None),
        ("base", None),
    ]
    assert told[2]["is_at_edge"] and told[2]["rates"] == [0.001, 0.002] and not told[0]["is_at_edge"]


def test_what_cannot_be_told_apart_from_the_first_is_said(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        add_run(tmp_path, trial_of(rank=4, seed=seed), score=2.0 + 0.1 * seed)
        add_run(tmp_path, trial_of(rank=8, seed=seed), score=2.4 - 0.1 * seed)
    _, findings, _ = drawn(tmp_path)
    cell = ranking_view(findings)["rows"][1]["cells"][2]
    # seed by seed -0.4, -0.2, 0: mean -0.2, s = 0.2, t(2) = 4.3027 (one comparison): 4.3027 * 0.2 / sqrt(3) = 0.497
    assert cell["text"] == "not told apart"
    assert cell["hint"] == "cannot be told apart from the first; first minus this one: -0.2 ± 0.5 (corrected), 3 seeds"
