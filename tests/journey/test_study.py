"""A study from its file to its table: row zero, reuse, intervals, what wins over what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from lora_lab.record.result import Status
from tests.journey.program import CHECKOUT, Lab, call, metrics_of

STUDY = """\
question: Does the rank matter on the smallest model?
base:
  learning_rate: 1e-2
  scheduler: constant
baseline: true
seeds: [0, 1, 2]
grids:
  - {rank: [2, 4], target: [qv]}
  - zip: {rank: [2, 8], alpha: [3, 5]}
    target: [[query, mlp]]
metrics: [heldout/loss, heldout/exact_match]
"""
OTHER = """\
question: And with two seeds?
baseline: true
seeds: [5, 6]
grids: [{dropout: [0.0, 0.5]}]
metrics: [heldout/loss]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two studies of its own; one bears the name of a study of the lab."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "first_look.yaml").write_text(STUDY)
    (tmp_path / "sweeps" / "other.yaml").write_text(OTHER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_study_runs_is_kept_and_shares_its_baseline(here: Path, lab: Lab) -> None:
    assert (CHECKOUT / "sweeps" / "first_look.yaml").exists(), "the name is meant to be the lab's own as well"
    answer = lab.run("-m", "study=first_look", "--json")
    assert answer.code == 0, answer.err
    table = answer.json()
    base, *rows = table["rows"]

    assert [metric["name"] for metric in table["metrics"]] == ["heldout/loss", "heldout/exact_match"]
    assert base["is_base"] and base["name"] == "base"
    assert base["runs"] == base["completed"] == 1
    assert base["trainable_parameters"] == 0
    assert base["metrics"]["heldout/loss"]["interval"] is None
    assert [row["completed"] for row in rows] == [3] * 4
    assert [(row["axes"]["rank"], row["axes"]["alpha"]) for row in rows] == [(2, 4.0), (4, 8.0), (2, 3.0), (8, 5.0)]
    assert len(lab.runs()) == 13
    for row in rows:
        cell = row["metrics"]["heldout/loss"]
        values = [point["value"] for point in cell["points"]]
        assert [point["seed"] for point in cell["points"]] == [0, 1, 2]
        low, high = stats.t.interval(0.95, 2, loc=cell["mean"], scale=stats.sem(values))
        assert (cell["interval"]["low"], cell["interval"]["high"]) == pytest.approx((low, high), rel=1e-9)
        assert cell["mean"] == pytest.approx(sum(values) / 3, rel=1e-12)

    kept = lab.root / "studies" / "first_look"
    assert json.loads((kept / "table.json").read_text()) == table
    assert len(json.loads((kept / "runs.json").read_text())["runs"]) == 13

    base_file = next(record for record in lab.runs() if record.name == "base").folder / "result.json"
    before = base_file.stat().st_mtime_ns
    other = lab.run("-m", "study=other", "--json")
    assert other.code == 0, other.err
    assert "4 runs to do" in other.err, "the base is not scored again"
    assert base_file.stat().st_mtime_ns == before
    row_zero, *others = other.json()["rows"]
    assert row_zero["is_base"]
    assert row_zero["metrics"]["heldout/loss"] == base["metrics"]["heldout/loss"]
    for row in others:
        cell = row["metrics"]["heldout/loss"]
        assert cell["interval"] is None and len(cell["points"]) == 2

    text = lab.run("-m", "study=other")
    assert "fewer than 3 seeds: the points" in text.out
    assert text.out.splitlines()[1].startswith("base")
    again = lab.run("-m", "study=first_look", "--json")
    assert "nothing to run" in again.err
    assert metrics_of(again.json()) == metrics_of(table)

    listed = lab.ask("runs", "--study", "other", "--json").json()
    assert sorted(row["seed"] for row in listed if row["method.kind"] == "lora") == [5, 5, 6, 6]
    assert len(listed) == 5
    unknown = lab.ask("runs", "--study", "othr")
    assert unknown.code == 2 and 'did you mean "other"?' in unknown.err


def test_plan_of_a_study(here: Path, lab: Lab) -> None:
    rows = lab.plan("-m", "study=first_look", "--json").json()
    assert len(rows) == 13
    assert rows[0]["name"] == "base" and rows[0]["steps"] == 0 and rows[0]["trainable_parameters"] == 0
    assert {row["state"] for row in rows} == {"new"}
    assert [row["steps"] for row in rows[1:]] == [2] * 12
    assert [row["name"] for row in rows[1:5]] == [
        f"lora-r{rank}-qv-s{seed}" for rank, seed in ((2, 0), (2, 1), (2, 2), (4, 0))
    ]
    assert not lab.root.exists(), "a plan writes no ledger"


def test_the_command_line_wins_over_the_study(here: Path, lab: Lab) -> None:
    rows = lab.plan("-m", "study=first_look", "training.max_steps=4", "seed=7", "--json").json()
    assert [row["steps"] for row in rows[1:]] == [4] * 12
    assert {row["name"].rpartition("-")[2] for row in rows[1:]} == {"s7"}
    assert [row["state"] for row in rows[1:]].count("duplicate") == 8, "three seeds became one"

    swept = lab.plan("-m", "study=other", "seed=1", "training.max_steps=2,3", "--json").json()
    assert sorted({row["steps"] for row in swept}) == [0, 2, 3]


def test_a_failed_baseline_is_tried_again(here: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:

    from lora_lab.runner import run

    score = run.score_model

    def failing(model: object, *args: object, **kwargs: object) -> object:
        if type(model).__name__ == "LlamaForCausalLM":
            raise RuntimeError("injected")
        return score(model, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(run, "score_model", failing)
        answer = lab.run("-m", "study=other", "--json")
    assert answer.code == 3
    row_zero, *others = answer.json()["rows"]
    assert row_zero["is_base"] and row_zero["statuses"] == {"FAILED": 1}
    assert [row["completed"] for row in others] == [2, 2]
    assert lab.run("-m", "study=other").code == 0
    assert [record.state for record in lab.runs()] == [Status.COMPLETED] * 5


def test_what_is_wrong_with_a_study_is_said_before_anything_runs(here: Path, lab: Lab) -> None:
    (here / "sweeps" / "wrong.yaml").write_text("question: a\ngrids:\n  - {rank: [4], lerning_rate: [1]}\n")
    answer = lab.run("-m", "study=wrong")
    assert answer.code == 2
    assert 'did you mean "learning_rate"?' in answer.err
    (here / "sweeps" / "wrong.yaml").write_text("question: a\nseed: 3\ngrids: []\n")
    answer = lab.run("-m", "study=wrong")
    assert answer.code == 2
    assert "wrong.yaml:2:" in answer.err and "wrong.yaml:3:" in answer.err
    (here / "sweeps" / "wrong.yaml").write_text("question: a\ngrids: [{rank: [2]}]\nmetrics: [heldot/loss]\n")
    answer = lab.run("-m", "study=wrong")
    assert answer.code == 2 and 'did you mean "heldout"?' in answer.err

    answer = lab.run("-m", "study=othr")
    assert answer.code == 2 and 'did you mean "other"?' in answer.err
    assert lab.run("study=other").code == 2
    assert "run -m study=other" in lab.run("study=other").err
    assert not lab.root.exists()


def test_the_labs_own_study_is_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("plan", "-m", "study=first_look", f"root='{tmp_path}'", "--json")
    assert answer.code == 0, answer.err
    rows = answer.json()
    assert rows[0]["name"] == "base"
    assert {row["total_parameters"] for row in rows if row["name"] == "base"} == {134515008}


def test_a_trial_measured_once_more_stays_one_trial_of_its_study(here: Path, lab: Lab) -> None:
    """Whichever repeat the last call asked for, its table, its page and its list of runs hold both."""
    assert lab.run("-m", "study=other").code == 0
    again = lab.run("-m", "study=other", "repeat=1", "--json")
    assert again.code == 0, again.err
    for answer in (again, lab.run("-m", "study=other", "--json")):
        base, *rows = answer.json()["rows"]
        assert [(row["trials"], row["runs"]) for row in rows] == [(2, 4)] * 2
        assert [len(row["metrics"]["heldout/loss"]["points"]) for row in rows] == [2, 2]
        assert base["runs"] == 1
    assert len(lab.ask("runs", "--study", "other", "--json").json()) == 9
    told = lab.ask("report", "other", "--json").json()
    assert len(told["runs"]) == 9 and [row["runs"] for row in told["table"]["rows"]] == [1, 4, 4]
    assert "not begun" not in (lab.root / "studies" / "other" / "report.html").read_text().partition("<script")[0]
