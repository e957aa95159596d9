"""Runs that a search has stopped: shown and counted everywhere, in no mean, and their settings in no comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from lora_lab.app.execution import _exit_code
from lora_lab.errors import InputError
from lora_lab.record.export import rows_of, to_csv
from lora_lab.record.ledger import Ledger
from lora_lab.record.parents import parent_identities
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.wandb_mapping import exit_code, score_row, study_summary, summary_of
from lora_lab.report.figures import heat_map
from lora_lab.report.page import Subject, draw_page
from lora_lab.report.page_settings import table_view
from lora_lab.report.page_words import facts
from lora_lab.report.sentence import answer_sentence
from lora_lab.report.sweep import Sweep
from lora_lab.report.terminal import print_comparison, print_runs, print_table
from lora_lab.study.compare import compare_runs
from lora_lab.study.curves import setting_curves
from lora_lab.study.findings import Findings, findings_of
from lora_lab.study.memory_parts import memory_parts
from lora_lab.study.pareto import pareto_front
from lora_lab.study.table import SettingRow
from tests.conftest import MakeTrial
from tests.page_ledger import add_run
from tests.unit.ledger_samples import ended, loss, trial_of
from tests.unit.test_plan_stopping import HALVING, MEDIAN, OFF
from tests.unit.test_record_evaluations import FACTS

LOSS = "heldout/loss"
REASON = "held-out loss 3 is not among the best 3 of 9 runs: 4 of other settings are better, at step 5 of 45"
# Better than any real score: wherever it were taken in, it would show.
LURE = {LOSS: loss(0.001)}


def add_stopped(root: Path, **trial: Any) -> RunRecord:
    """A run that was stopped, in whose result a score stands all the same."""
    facts = {"executed": "alone", "warnings": [], "stopping": {**FACTS, "reason": REASON}}
    costs = {"peak_allocated_bytes": 9_000_000_000_000, "train_seconds": 1e-6, "steps": 5}
    return add_run(
        root,
        trial_of(**trial),
        steps=5,
        status=Status.STOPPED,
        reason=REASON,
        metrics=LURE,
        facts=facts,
        measurements=costs,
    )


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 2 and 4 whole, of rank 8 (the best by what is left) one seed of three stopped, of rank 16 all."""
    root = tmp_path_factory.mktemp("lab")
    for rank, scores in ((2, [2.5, 2.6, 2.7]), (4, [3.0, 3.1, 3.3]), (8, [1.0, 1.1])):
        for seed, score in enumerate(scores):
            add_run(root, trial_of(rank=rank, seed=seed), score=score)
    add_stopped(root, rank=8, seed=2)
    for seed in range(3):
        add_stopped(root, rank=16, seed=seed)
    return root


@pytest.fixture(scope="module")
def findings(ledger: Path) -> Findings:
    return findings_of(Ledger(ledger).runs(), metrics=[LOSS])


def row_of_rank(findings: Findings, rank: int) -> SettingRow:
    """The setting's row."""
    return next(row for row in findings.table.rows if row.axes["rank"] == rank)


def test_no_mean_and_no_cost_contains_them(findings: Findings) -> None:
    cut, all_stopped = row_of_rank(findings, 8), row_of_rank(findings, 16)
    assert cut.statuses == {"COMPLETED": 2, "STOPPED": 1} and all_stopped.statuses == {"STOPPED": 3}
    assert cut.cells[LOSS].mean == pytest.approx(1.05) and len(cut.cells[LOSS].points) == 2
    assert all_stopped.cells[LOSS].points == () and all_stopped.cells[LOSS].missing == "no completed run"
    assert cut.cost["peak_allocated_bytes"] < 1e9 and cut.cost["train_seconds"] > 1 and not all_stopped.cost
    assert cut.reasons == (f"lora-r8-s2: STOPPED: {REASON}",)
    assert (cut.stopped, all_stopped.stopped, row_of_rank(findings, 2).stopped) == (1, 3, 0)
    assert cut.incomparable == "1 of 3 runs was stopped early" and row_of_rank(findings, 2).incomparable is None
    parts = memory_parts(findings.records, cut)
    assert parts is not None and parts.peak_bytes is not None and parts.peak_bytes < 1e9


def test_a_setting_that_lost_its_worse_runs_is_compared_with_no_other(findings: Findings) -> None:
    """Rank 8 would be the best of all."""
    answer = findings.answer
    assert answer.best is not None and (answer.best.name, answer.best.lost) == ("lora-r2", 0)
    assert answer.case == "compared" and answer.cut_short == ("lora-r8",) and answer.comparisons == 1
    assert answer.counts == {"COMPLETED": 8, "STOPPED": 4}
    assert "lora-r8" not in (*answer.beaten, *answer.ties, *answer.not_compared)
    assert json.loads(json.dumps(answer.to_json()))["cut_short"] == ["lora-r8"]
    sentence = answer_sentence(answer)
    assert sentence.startswith("lora-r2 has the lowest heldout/loss, 2.6")
    assert "; 4 runs were stopped early, and 1 setting with other runs is left out" in sentence


def test_the_ranking_leaves_it_unranked_and_says_why(findings: Findings) -> None:
    places = {one.name: (one.score_rank, one.unranked) for one in findings.ranking.contenders}
    assert places["lora-r2"] == (1, None) and places["lora-r4"] == (2, None)
    assert places["lora-r8"] == (None, "1 of 3 runs was stopped early") and places["lora-r16"] == (None, "no score")
    assert findings.ranking.comparisons == findings.answer.comparisons


def test_a_rate_with_stopped_runs_does_not_stand_for_its_contender(tmp_path: Path) -> None:
    for rate, scores in ((1e-3, [2.0, 2.1]), (2e-3, [3.0, 3.1, 3.2])):
        for seed, score in enumerate(scores):
            add_run(tmp_path, trial_of(learning_rate=rate, seed=seed), score=score)
    add_stopped(tmp_path, learning_rate=1e-3, seed=2)
    (one,) = findings_of(Ledger(tmp_path).runs(), metrics=[LOSS]).ranking.contenders
    assert (one.rate, one.rates, one.score.mean) == (2e-3, (1e-3, 2e-3), pytest.approx(3.1))
    add_stopped(tmp_path, learning_rate=2e-3, seed=3)
    (one,) = findings_of(Ledger(tmp_path).runs(), metrics=[LOSS]).ranking.contenders
    assert (one.rate, one.unranked) == (None, "runs of every rate that has a score were stopped early")


def test_effects_front_and_heat_map_leave_it_out(tmp_path: Path) -> None:
    for rank, rate in ((2, 1e-3), (2, 2e-3), (4, 1e-3)):
        for seed in range(3):
            add_run(tmp_path, trial_of(rank=rank, learning_rate=rate, seed=seed), score=2.0 + rank + seed / 10)
    for seed in range(3):
        add_run(tmp_path, trial_of(rank=4, learning_rate=2e-3, seed=seed), score=0.5 + seed / 10)
    add_stopped(tmp_path, rank=4, learning_rate=2e-3, seed=3)
    found = findings_of(Ledger(tmp_path).runs(), metrics=[LOSS])
    effects = {effect.axis: effect for effect in found.effects}
    assert [(one.pairs, one.left_out) for one in effects.values()] == [(1, 1), (1, 1)]
    assert effects["rank"].difference == pytest.approx(2.0), "of the pair at rate 1e-3 alone"
    front = pareto_front(found.table, LOSS, "peak_allocated_bytes")
    cut = next(row for row in found.table.rows if row.stopped)
    assert cut.setting not in {point.setting for point in front.points}
    assert front.missing[cut.setting] == "1 of 4 runs was stopped early"
    (drawn,) = heat_map(found.table, found.axes, found.table.columns[0], "rank", "learning_rate")["data"]
    assert drawn["z"][1] == [pytest.approx(4.1), None]


def test_an_axis_whose_one_side_was_stopped_says_so(tmp_path: Path) -> None:
    for seed in range(3):
        add_run(tmp_path, trial_of(rank=2, seed=seed))
        add_run(tmp_path, trial_of(rank=4, seed=seed))
    add_stopped(tmp_path, rank=4, seed=3)
    (effect,) = findings_of(Ledger(tmp_path).runs(), metrics=[LOSS]).effects
    assert (effect.difference, effect.missing) == (None, "runs of one side were stopped early")


def test_where_every_setting_lost_runs_none_is_compared(tmp_path: Path) -> None:
    for rank in (2, 4):
        add_run(tmp_path, trial_of(rank=rank))
        add_stopped(tmp_path, rank=rank, seed=1)
    answer = findings_of(Ledger(tmp_path).runs(), metrics=[LOSS]).answer
    assert (answer.case, answer.best, answer.cut_short) == ("cut_short", None, ("lora-r2", "lora-r4"))
    assert answer_sentence(answer) == (
        "No setting is compared: runs of every setting that has a score were stopped early (2 COMPLETED, 2 STOPPED)."
    )


def test_few_seeds_say_it_too(tmp_path: Path) -> None:
    add_run(tmp_path, trial_of(rank=2), score=2.0)
    add_stopped(tmp_path, rank=4)
    sentence = answer_sentence(findings_of(Ledger(tmp_path).runs(), metrics=[LOSS]).answer)
    assert sentence.endswith("so nothing is claimed; 1 run was stopped early.")


def test_its_curve_is_drawn_and_in_no_mean(findings: Findings) -> None:
    curves, missing = setting_curves(findings.records, findings.table.rows, "loss")
    by_name = {curve.name: curve for curve in curves}
    assert missing == [] and {*by_name} == {"lora-r2", "lora-r4", "lora-r8", "lora-r16"}
    cut, all_stopped = by_name["lora-r8"], by_name["lora-r16"]
    assert (cut.seeds, len(cut.runs), cut.runs[2].state) == (2, 3, "STOPPED")
    assert len(cut.steps) == 12, "the mean goes on where the stopped run ended after 5 steps"
    assert all_stopped.steps == () and all(run.series["loss"].steps[-1] == 5 for run in all_stopped.runs)


def test_the_terminal_counts_and_explains(findings: Findings) -> None:
    stream = io.StringIO()
    print_table(findings.table, stream=stream)
    text = stream.getvalue()
    assert "2 of 3" in text and "0 of 3" in text
    assert (
        "4 of 12 runs were stopped early by the search and are in no mean; not compared with others, since what they "
        "have left are their better runs: lora-r8."
    ) in text
    assert f"not in a mean: lora-r16-s1: STOPPED: {REASON}" in text
    stream = io.StringIO()
    print_runs(findings.records, stream=stream)
    assert stream.getvalue().count(REASON) == 4 and "STOPPED" in stream.getvalue()


def test_the_page_shows_them(ledger: Path, findings: Findings) -> None:
    subject = Subject(title="s", question="q", source=None, planned=12, ledger=ledger)
    page = draw_page(subject, findings, folder=ledger)
    assert '<span class="chip stopped">STOPPED</span>' in page and ".chip.stopped" in page
    assert "4 of 12 runs were stopped early" in page and "Not ranked: lora-r8: 1 of 3 runs was stopped early." in page
    assert REASON in page
    told = {one["name"]: (one["value"], one["tone"]) for one in facts(findings, planned=12)}
    assert told["stopped"] == ("4", "muted"), "no cause for alarm"
    shown = {row["name"]: row["cells"][1] for row in table_view(findings.table)["rows"]}
    assert shown["lora-r8"]["text"] == "1.00, 1.10" and not shown["lora-r8"]["best"], "shown, and no winner"
    assert shown["lora-r2"]["best"]


def test_a_search_that_stops_runs_has_no_failures(findings: Findings) -> None:
    """And what a stopped run took says how long a run of this search takes."""
    now = 0.0
    sweep = Sweep(lambda: now)
    sweep.begin(3)
    stopped = [record for record in findings.records if record.state == Status.STOPPED]
    for record in stopped[:2]:
        assert record.header is not None and record.result is not None
        sweep.start(record.header, 45)
        now += 10
        sweep.finish(record.header, record.result)
    view = sweep.view()
    assert view.failures == () and view.outcomes == {"STOPPED": 2} and view.seconds_left == pytest.approx(10)


def test_two_runs_are_not_compared_by_where_one_was_stopped(findings: Findings) -> None:
    whole, cut = findings.records[0], next(one for one in findings.records if one.state == Status.STOPPED)
    for record in (whole, cut):
        line = json.dumps({"index": 0, "loss": 0.001, "loss_tokens": 1, "exact_match": True})
        (record.eval_folder / "heldout.jsonl").write_text(f"{line}\n{line.replace('0', '1', 1)}\n")
    comparison = compare_runs(whole, cut)
    assert comparison.metrics == comparison.paired == () and comparison.notes == ("b is STOPPED",)
    assert comparison.missing[LOSS] == "only in a"
    print_comparison(comparison, stream=(stream := io.StringIO()))
    assert "note: b is STOPPED" in stream.getvalue() and "0.001" not in stream.getvalue()


def test_wandb_shows_a_run_that_finished_without_a_score(findings: Findings) -> None:
    record = next(one for one in findings.records if one.state == Status.STOPPED)
    assert record.header is not None and record.result is not None
    assert exit_code(record.result) == 0 and score_row(record.result) is None
    summary = summary_of(record.header, record.result, state="STOPPED")
    assert summary["status"] == "STOPPED" and summary["reason"] == REASON
    assert not any(name.startswith("eval/") for name in summary)
    assert study_summary(findings.table.to_json())["stopped_count"] == 4


def test_an_export_has_the_status_the_reason_and_the_rule(findings: Findings) -> None:
    record = next(one for one in findings.records if one.state == Status.STOPPED)
    (row,) = rows_of([record])
    assert (row["status"], row["reason"]) == ("STOPPED", REASON)
    assert (row["facts.stopping.rule"], row["facts.stopping.point"], row["facts.stopping.value"]) == ("halving", 1, 3.0)
    to_csv([row], stream := io.StringIO())
    assert "STOPPED" in stream.getvalue()


def test_nothing_is_built_on_a_stopped_run(tmp_path: Path, make_trial: MakeTrial) -> None:
    record = ended(tmp_path, trial_of(), status=Status.STOPPED, facts={"stopping": FACTS})
    with pytest.raises(InputError, match="is STOPPED; expected a completed run"):
        parent_identities(make_trial(f"init_from={record.run_id}"), Ledger(tmp_path), base="random")


def test_a_call_is_done_when_its_own_rule_has_stopped_what_did_not_complete(tmp_path: Path) -> None:
    records = [ended(tmp_path, trial_of(rank=2))]
    records.append(ended(tmp_path, trial_of(rank=4), status=Status.STOPPED, facts={"stopping": FACTS}))
    assert _exit_code(records, HALVING, expected=2) == 0
    assert _exit_code(records, MEDIAN, expected=2) == _exit_code(records, OFF, expected=2) == 3
    assert _exit_code(records, HALVING, expected=3) == 3, "one was not begun"
    records.append(ended(tmp_path, trial_of(rank=8), status=Status.DIVERGED))
    assert _exit_code(records, HALVING, expected=3) == 3
