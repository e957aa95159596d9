"""What a reader sees where runs were trained together: whose numbers, which are missing and why, what measures them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from lora_lab.app.cli import main
from lora_lab.record.export import rows_of
from lora_lab.record.ledger import Ledger
from lora_lab.record.model_card import card_text
from lora_lab.record.result import Status
from lora_lab.report.cohort_words import alone_sentences
from lora_lab.report.figures import drawable, memory_bars, missing_figure
from lora_lab.report.page import Subject, draw_page
from lora_lab.report.page_figures import families
from lora_lab.report.terminal import print_runs, print_table
from lora_lab.report.wandb_workspace import intervals_markdown, study_windows
from lora_lab.study.alone import MEMORY, TIME, NotAlone
from lora_lab.study.findings import Findings, findings_of
from tests.conftest import MakeTrial
from tests.page_ledger import add_cohort, add_run
from tests.unit.ledger_samples import as_member, claim, result_of, trial_of
from tests.unit.test_report_page import Page

LOSS = "heldout/loss"
TIME_OF_NONE = "compared between runs made alone only; none of 2 settings has one among their 4 runs: lora-r2, lora-r4."


def together(root: Path, *, on_cpu: bool = True) -> Findings:
    """Ranks 2 and 4 of two seeds, all in one cohort."""
    trials = [trial_of(rank=rank, seed=seed) for rank in (2, 4) for seed in (0, 1)]
    add_cohort(root, "5f0c", trials, seats=3, on_cpu=on_cpu)
    return findings_of(Ledger(root).runs(), metrics=[LOSS])


def beside_alone(root: Path) -> Findings:
    """As `together`, and rank 4 measured once more alone; the other setting's times stay unknown."""
    together(root)
    for seed in (0, 1):
        add_run(root, trial_of(rank=4, seed=seed), repeat=1, score=2.52 + 0.01 * seed)
    return findings_of(Ledger(root).runs(), metrics=[LOSS])


def page_of(findings: Findings, root: Path) -> tuple[Page, str]:
    subject = Subject(title="ranks", question="?", source=None, planned=len(findings.records), ledger=Path("lab"))
    text = draw_page(subject, findings, folder=root)
    return Page(text), text


def cells_of(text: str, section: str) -> dict[str, list[str]]:
    """Texts of the cells of a section's table by the name of their row."""
    body = text[text.index(f'<section id="{section}"') :].partition("</tbody>")[0].partition("<tbody>")[2]
    rows = [re.sub(r"<svg.*?</svg>", "", row) for row in body.split("</tr>")[:-1]]
    cells = [
        [re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)] for row in rows
    ]
    return {first: rest for first, *rest in cells}


def printed(findings: Findings) -> str:
    stream = io.StringIO()
    print_table(findings.table, stream=stream)
    return stream.getvalue()


def test_times_are_of_the_repeats_made_alone_and_scores_of_all_runs_each_trial_once(tmp_path: Path) -> None:
    findings = beside_alone(tmp_path)
    _, text = page_of(findings, tmp_path)
    rows = cells_of(text, "settings")
    # seeds, loss, trainable, memory, time, speed; rank 4 alone: 900 MB + 16 * 4000 bytes, 10 + 0.4 s
    assert rows["lora-r2"] == ["2", "2.50, 2.51", "2,000", "700 MB", "-", "-"]
    assert rows["lora-r4"] == ["2", "2.52, 2.53", "4,000", "900 MB", "10.4 s", "300"]
    lines = [line.split() for line in printed(findings).splitlines()]
    assert ["lora-r2", "2", "2.50,", "2.51", "2,000", "700", "MB", "-"] in lines
    assert ["lora-r4", "2", "2.52,", "2.53", "4,000", "900", "MB", "10.4", "s"] in lines


def test_the_study_says_which_settings_have_no_time_and_what_measures_them(tmp_path: Path) -> None:
    findings = beside_alone(tmp_path)
    page, text = page_of(findings, tmp_path)
    told = "Time is compared between runs made alone only; 1 of 2 settings has none among its 2 runs: lora-r2. "
    told += "To measure: "
    command = "lora-lab run -m study=ranks launch.cohort=off repeat=1"
    for section in ("settings", "ranking", "cost"):
        assert told + command in text[text.index(f'id="{section}"') :].partition("</section>")[0]
    assert told + "the same command with launch.cohort=off repeat=1" in printed(findings)
    assert "Memory is" not in page.text, "peaks were counted on steps made alone"


def test_columns_without_any_value_say_why(tmp_path: Path) -> None:
    findings = together(tmp_path, on_cpu=False)
    page, text = page_of(findings, tmp_path)
    assert f"Time and memory are {TIME_OF_NONE}" in page.text and f"Time and memory are {TIME_OF_NONE}" in printed(
        findings
    )
    assert all(row[3:] == ["-", "-", "-"] for row in cells_of(text, "settings").values())
    hints = re.findall(r'<td class="number missing" title="([^"]*)"><span>-', text)
    assert len(hints) >= 6 and set(hints[:6]) == {"no run was executed alone (2 of 2 trained in cohorts)"}
    for title in ("peak memory", "train time", "tokens/s"):
        assert f"No {title}: trained in cohorts; launch.cohort=off repeat=1 measures them alone (4 runs)." in page.text
    stream = io.StringIO()
    print_runs(findings.records, stream=stream)
    assert (
        "no train time: trained in cohorts; launch.cohort=off repeat=1 measures them alone (4 runs)"
        in stream.getvalue()
    )
    one = page.blocks["settings-data"][findings.table.rows[0].setting[:12]]
    assert one["runs"][0]["values"][-3:] == [None] * 3
    assert set(one["runs"][0]["missing"][-3:]) == {
        "trained in cohort 5f0c with 3 others; launch.cohort=off repeat=1 measures it alone"
    }
    assert "No train time: no run was executed alone (2 of 2 trained in cohorts)." in one["notes"]


def test_an_empty_column_of_another_cause_says_that(tmp_path: Path) -> None:
    add_run(tmp_path, trial_of(), measurements={"peak_allocated_bytes": 5}, missing={"train_seconds": "no clock"})
    findings = findings_of(Ledger(tmp_path).runs(), metrics=[LOSS])
    assert "no train time: no clock" in printed(findings)
    page, _ = page_of(findings, tmp_path)
    assert "No train time: no clock." in page.text and "No tokens/s: not measured." in page.text
    failed = findings_of([add_run(tmp_path / "b", trial_of(), status=Status.FAILED)], metrics=None)
    assert "no train time: no completed run" in printed(failed)


def test_figures_of_cost_say_why_they_are_not_drawn(tmp_path: Path) -> None:
    findings = together(tmp_path, on_cpu=False)
    drawn = {family.id: family for family in families(findings)}
    reason = "no run was executed alone (2 of 2 trained in cohorts)"
    figure = drawn["cost"].figures[f"{LOSS}|train_seconds"]
    assert figure == missing_figure(f"no setting has both {LOSS} and training time (no train_seconds: {reason})")
    assert "tokens_per_second" not in drawn["curves"].figures
    assert "No tokens per second (runs trained in cohorts: no speed of their own)." in drawn["curves"].notes
    shown = go.Figure(drawable(figure))
    assert shown.layout.annotations[0].text == figure["missing"] and not shown.data
    assert drawable(drawn["cost"].figures[f"{LOSS}|trainable_parameters"])["data"]
    with pytest.raises(ValueError, match="missing"):
        go.Figure(memory_bars([]))


def test_the_section_of_cohorts_holds_numbers_of_result_files_and_links_to_the_runs(tmp_path: Path) -> None:
    findings = beside_alone(tmp_path)
    page, text = page_of(findings, tmp_path)
    # four members of 12 steps and 4,800 tokens; the last of them ended after 40 s, at 345 + 40 tokens/s and 40 GB
    assert cells_of(text, "cohorts") == {"5f0c": ["3", "4", "48", "19,200", "385", "40.0 s", "40.0 GB"]}
    section = text[text.index('<section id="cohorts">') :].partition("</section>")[0]
    members = [record.run_id for record in findings.records if record.result and record.result.repeat == 0]
    last = max(members, key=lambda one: Ledger(tmp_path).resolve(one).result.measurements["cohort_wall_seconds"])  # type: ignore[union-attr]
    targets = re.findall(r'href="#run-([^"]*)"', section)
    assert targets[:3] == [last] * 3 and sorted(targets[3:]) == sorted(members)
    assert {"href": "#cohorts"} in page.all("a")
    assert "1, of 4 runs" in page.text
    assert findings.to_json()["cohorts"][0]["shared"]["cohort_wall_seconds"] == {"value": 40.0, "run_id": last}


def test_no_such_section_where_every_run_was_alone(tmp_path: Path) -> None:
    add_run(tmp_path, trial_of())
    _, text = page_of(findings_of(Ledger(tmp_path).runs(), metrics=None), tmp_path)
    assert 'id="cohorts"' not in text and 'href="#cohorts"' not in text


def test_the_page_of_a_member_names_its_cohort_and_shows_shared_numbers_as_such(tmp_path: Path) -> None:
    findings = together(tmp_path)
    page, _ = page_of(findings, tmp_path)
    one = page.blocks[f"run-data-{findings.records[0].run_id}"]
    assert ["executed", "in cohort 5f0c of 3 seats, together with 3 others"] in one["identity"]
    measured = dict(one["measurements"])
    assert "cohort train seconds" in measured and "train seconds" not in measured
    assert "cohort_tokens_per_second" in one["curves"]["values"]
    assert "tokens_per_second" not in one["curves"]["values"] and "rss_bytes" not in one["curves"]["values"]
    assert "train_seconds" in dict(one["missing"])


def test_the_export_keeps_shared_numbers_under_the_cohorts_names(tmp_path: Path) -> None:
    row = rows_of(together(tmp_path).records)[0]
    assert row["facts.executed"] == "cohort" and row["facts.cohort.id"] == "5f0c" and row["facts.cohort.seats"] == 3
    assert len(json.loads(row["facts.cohort.members"])) == 4
    assert {"cohort_train_seconds", "cohort_tokens_per_second", "cohort_wall_seconds"} <= row.keys()
    assert not {"train_seconds", "tokens_per_second", "wall_seconds", "step_seconds"} & row.keys()
    assert "measures it alone" in json.loads(row["missing"])["train_seconds"]


def test_the_card_of_a_member(tmp_path: Path, make_trial: MakeTrial) -> None:
    folder = claim(Ledger(tmp_path), make_trial().model_dump(mode="json"))
    assert folder is not None
    folder.close()
    fields = as_member("5f0c", ["x", "y", folder.run_id], seats=3, wall=40.0)
    fields["facts"] |= {"device": "cpu", "model_folder": "lab/cache/models/m"}
    machine: dict[str, Any] = {"cpu": "c", "cores": 2, "usable_cores": 2, "memory_bytes": 8 * 10**9, "gpu": None}
    machine |= {"python": "3.11.0", "packages": {}, "code": {"commit": None, "dirty": False}}
    card = card_text(folder.adapter_folder, folder.header, result_of(folder, **fields), machine)
    costs = card[card.index("## Memory and time") :].partition("\n## ")[0]
    assert "2 other runs, in cohort `5f0c` of 3 seats" in costs and "training of the whole cohort" in costs
    assert "| training |" not in costs and "| the whole run |" not in costs and "| training speed, tokens" not in costs
    missing = card[card.index("## Not measured") :].partition("\n## ")[0]
    assert "`train_seconds`: trained in cohort 5f0c with 2 others" in missing


def test_the_report_as_data_has_cohorts_and_what_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together(tmp_path)
    assert main(["report", "--json", "--root", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["id"], one["steps"], one["ended"]) for one in told["cohorts"]] == [("5f0c", 48, 4)]
    (lacking,) = told["table"]["not_alone"]
    assert lacking == {"cost": TIME, "settings": ["lora-r2", "lora-r4"], "runs": 4, "of": 2, "repeat": 1}


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        ([NotAlone(TIME, ("a",), 3, 1, 1)], "Time is {}; the only setting has none among its 3 runs: a."),
        ([NotAlone(TIME, ("a",), 1, 4, 1)], "Time is {}; 1 of 4 settings has none among its only run: a."),
        ([NotAlone(TIME, ("a", "b"), 6, 4, 1)], "Time is {}; 2 of 4 settings have none among their 6 runs: a, b."),
        ([NotAlone(TIME, ("a", "b"), 6, 2, 1)], "Time is {}; none of 2 settings has one among their 6 runs: a, b."),
    ],
)
def test_the_sentence_counts_right(lacking: list[NotAlone], told: str) -> None:
    (sentence,) = alone_sentences(lacking)
    assert sentence.startswith(told.format("compared between runs made alone only"))


def test_time_and_memory_are_one_sentence_where_the_same_settings_lack_both() -> None:
    time, memory = (NotAlone(cost, ("a", "b"), 4, 3, 2) for cost in (TIME, MEMORY))
    (both,) = alone_sentences([time, memory])
    assert both.startswith("Time and memory are compared") and both.endswith("launch.cohort=off repeat=2")
    first, second = alone_sentences([time, NotAlone(MEMORY, ("b",), 2, 3, 1)])
    assert first.startswith("Time is") and second.startswith("Memory is")
    many = alone_sentences([NotAlone(TIME, tuple("abcdefghijk"), 11, 11, 1)])
    assert "h and 3 more." in many[0] and ", i" not in many[0]
    assert alone_sentences([]) == []


@pytest.mark.parametrize(
    ("root", "where"),
    [("lab", ""), ("other lab", " root='other lab'"), ("/home/somebody/lab", " root=...")],
)
def test_the_command_of_a_study_names_its_root_but_no_folder_of_the_machine(root: str, where: str) -> None:
    (told,) = alone_sentences([NotAlone(TIME, ("a",), 1, 1, 1)], study="ranks", root=Path(root))
    assert told.endswith(f"To measure: lora-lab run -m study=ranks launch.cohort=off repeat=1{where}")


@pytest.mark.parametrize(("alone", "drawn"), [(False, set()), (True, {"train_seconds", "train/tokens_per_second"})])
def test_windows_in_wandb_have_panels_of_what_was_measured_only(tmp_path: Path, alone: bool, drawn: set[str]) -> None:
    findings = beside_alone(tmp_path) if alone else together(tmp_path)
    table = findings.table.to_json()
    windows = study_windows("ranks", table, question="?", project="p", entity="e")
    text = json.dumps(windows.specs())
    for name in ("train_seconds", "train/tokens_per_second"):
        assert (name in text) is (name in drawn)
    assert "train/loss" in text and "peak_allocated_bytes" in text
    markdown = intervals_markdown(table, study="ranks")
    assert "Time is compared between runs made alone only" in markdown and "study=ranks launch.cohort=off" in markdown
    assert "| lora-r2 | 2 of 2 |" in markdown and "| lora-r4 | 2 of 2 |" in markdown, "seeds, not repeats"
