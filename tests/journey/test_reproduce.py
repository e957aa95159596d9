"""A study with claims from its file to its verdicts: what runs when, and what a deleted run does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.journey.program import Answer, call
from tests.journey.ranks_study import Study, begun, said


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Callable[[], tuple[Path, Answer]]:
    """The study after its first call, with what that call said; run once for all of this file."""
    kept: list[tuple[Path, Answer]] = []

    def run() -> tuple[Path, Answer]:
        if not kept:
            folder = tmp_path_factory.mktemp("first")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                kept.append((folder, begun(folder, tiny_cache).reproduce("--json")))
        return kept[0]

    return run


@pytest.fixture
def done(
    first: Callable[[], tuple[Path, Answer]], tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Study:
    """A copy of the study after its first call."""
    folder, answer = first()
    assert answer.code == 0, answer.err
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Study(tmp_path, tiny_cache)


def test_everything_runs_and_every_claim_gets_its_verdict(
    done: Study, first: Callable[[], tuple[Path, Answer]]
) -> None:
    answer = first()[1]
    told = answer.json()
    assert [(one["claim"], one["form"]) for one in told["verdicts"]] == [
        ("bigger", "as_published"),
        ("bigger", "tuned"),
        ("equal", "as_published"),
        ("slower", "as_published"),
        ("four_times", None),
        ("judged_elsewhere", None),
    ]
    decisions = said(answer)
    assert decisions["equal", "as_published"] == "holds"
    assert decisions["slower", "as_published"] == "holds"
    assert decisions["four_times", None] == "holds"
    assert decisions["judged_elsewhere", None] == "not runnable"
    words = {one["claim"]: one["word"] for one in told["verdicts"]}
    assert words["four_times"] == "reproduced", "arithmetic has no chance in it"
    assert words["equal"] == "same direction", "a pocket run reproduces nothing"

    verdicts = done.of("verdicts.json")
    assert [one["seeds"] for one in verdicts["looks"]] == [[0, 1, 2]]
    assert verdicts["registration"] == done.of("registration.json")["digest"] == told["registration"]
    assert verdicts["looks"][0]["verdicts"] == told["verdicts"]
    begun = min(record.header.claimed_at for record in done.lab.runs() if record.header is not None)
    assert done.of("registration.json")["registered_at"] <= begun
    assert verdicts["looks"][0]["begun_at"] <= begun
    assert (done.lab.root / "studies" / "ranks" / "report.html").is_file()
    planned = {one["run_id"]: one for one in done.of("points.json")["points"] if one["stage"] == "planned"}
    counts = done.of("planned.json")
    assert sorted(counts[run_id]["trainable_parameters"] for run_id in planned) == [896, 3584]


def test_tuning_picks_the_best_mean_and_the_edge_makes_the_tuned_form_inconclusive(
    done: Study, first: Callable[[], tuple[Path, Answer]]
) -> None:
    """With so few steps the highest rate is best for both ranks; it is the last that was tried."""
    points = done.of("points.json")["points"]
    for rank in (2, 8):
        tried = [one for one in points if one["stage"] == "tuning" and one["values"]["rank"] == rank]
        losses = {}
        for one in tried:
            record = done.lab.find(one["run_id"])
            assert record.result is not None and record.trial["learning_rate"] == one["rate"]
            assert record.trial["seed"] == 100 and record.trial["data"]["heldout_seed"] == 12
            losses[one["rate"]] = record.result.metrics["heldout/loss"].value
        best = min(losses, key=lambda rate: losses[rate])
        judged = [
            one
            for one in points
            if one["stage"] == "judged" and one["values"]["rank"] == rank and one["values"]["learning_rate"] == "tuned"
        ]
        assert [one["rate"] for one in judged] == [best] * 3 == [1e-2] * 3
        for one in judged:
            assert done.lab.find(one["run_id"]).trial["learning_rate"] == best
    (tuned,) = [one for one in first()[1].json()["verdicts"] if one["form"] == "tuned"]
    assert tuned["decision"] == "inconclusive" and "0.01" in " ".join(tuned["reasons"])


def test_the_clocks_runs_are_alone_and_interleaved(done: Study) -> None:
    records = sorted(
        (done.lab.find(run_id) for run_id in done.ids("timing")),
        key=lambda one: str(one.header and one.header.claimed_at),
    )
    assert len(records) == 6
    ranks = [record.trial["rank"] for record in records]
    assert [sorted(ranks[start : start + 2]) for start in (0, 2, 4)] == [[2, 8]] * 3
    for record in records:
        assert record.result is not None and record.result.facts["executed"] == "alone"
        assert record.trial["training"]["max_steps"] == 3 and "load_average_before" in record.result.measurements


def test_a_second_call_runs_nothing_and_says_the_same(done: Study, first: Callable[[], tuple[Path, Answer]]) -> None:
    before = {record.run_id: (record.folder / "result.json").stat().st_mtime_ns for record in done.lab.runs()}
    again = done.reproduce("--json")
    assert again.code == 0, again.err
    assert again.json()["verdicts"] == first()[1].json()["verdicts"]
    after = {record.run_id: (record.folder / "result.json").stat().st_mtime_ns for record in done.lab.runs()}
    assert before == after
    text = done.reproduce()
    assert "equal" in text.out and "same direction" in text.out
    (own,) = [
        one for one in call("reproduce", "--list", "--json", f"root={done.lab.root}").json() if one["name"] == "ranks"
    ]
    assert own["judged"] == "own ledger" and own["verdicts"]["same direction"] >= 2
    assert own["recorded_runs"] == len(done.lab.runs()) and own["seconds"] > 0


def test_an_edited_criterion_is_refused_and_a_typo_is_not(done: Study) -> None:
    runs = len(done.lab.runs())
    done.edit("margin: 3.0", "margin: 2.5")
    for flags in ((), ("--dry-run",), ("--seeds", "5,6,7")):
        answer = done.reproduce(*flags)
        assert answer.code == 2
        assert "claims.equal.margin: 3.0 became 2.5" in answer.err
    told = done.lab.ask("report", "ranks")
    assert told.code == 2 and "claims.equal.margin: 3.0 became 2.5" in told.err
    assert len(done.lab.runs()) == runs
    done.edit("margin: 2.5", "margin: 3.0")
    done.edit("They are nearly the same.", "They are almost the same.")
    assert done.reproduce().code == 0
    assert done.lab.ask("report", "ranks").code == 0


def test_a_deleted_run_is_never_made_up_for(done: Study) -> None:
    point = next(
        one
        for one in done.of("points.json")["points"]
        if one["stage"] == "judged" and one["values"]["learning_rate"] == 1e-2 and one["values"]["seed"] == 1
    )
    gone = done.lab.root / "runs" / point["run_id"]
    assert done.reproduce("--keep").code == 0
    shutil.rmtree(done.folder / "sweeps" / "records" / "runs" / point["run_id"])
    answer = call("reproduce", "ranks", "--recorded", "--json")
    assert answer.code == 0, answer.err
    assert said(answer)["equal", "as_published"] == "inconclusive"
    (verdict,) = [one for one in answer.json()["verdicts"] if one["claim"] == "equal"]
    assert point["run_id"] in " ".join(verdict["reasons"])

    shutil.rmtree(gone)
    (own,) = [
        one for one in call("reproduce", "--list", "--json", f"root={done.lab.root}").json() if one["name"] == "ranks"
    ]
    assert own["judged"] == "own ledger" and own["verdicts"]["inconclusive"] == 3, "a list does not keep it either"
    again = done.reproduce("--json")
    assert again.code == 0 and gone.is_dir(), "reproduce runs it once more"
    assert said(again)["equal", "as_published"] == "holds"


def test_kept_records_give_the_same_verdicts_without_a_lab(
    done: Study, first: Callable[[], tuple[Path, Answer]]
) -> None:
    kept = done.reproduce("--keep", "--json")
    assert kept.code == 0, kept.err
    assert kept.json()["runs"] == len(done.lab.runs())
    shutil.rmtree(done.lab.root)
    answer = call("reproduce", "ranks", "--recorded", "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["verdicts"] == first()[1].json()["verdicts"]
    records = done.folder / "sweeps" / "records"
    text = "".join(path.read_text() for path in records.rglob("*") if path.is_file())
    assert str(done.folder) not in text and str(done.cache) not in text
    largest = max(
        sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) for run in (records / "runs").iterdir()
    )
    assert largest < 30_000
    (own,) = [
        one for one in call("reproduce", "--list", "--json", f"root={done.lab.root}").json() if one["name"] == "ranks"
    ]
    assert own["judged"] == "kept records" and own["verdicts"]["same direction"] >= 2


def test_fresh_seeds_are_a_second_look_judged_on_them_alone(done: Study) -> None:
    taken = done.reproduce("--seeds", "2,3,4")
    assert taken.code == 2 and "2 belong to look 1" in taken.err and "--seeds 3,4,5" in taken.err
    assert done.reproduce("--seeds", "100,101,102").code == 2, "tuning's own"
    answer = done.reproduce("--seeds", "5,6,7", "--json")
    assert answer.code == 0, answer.err
    told = answer.json()
    assert told["seeds"] == [5, 6, 7] and told["looks"] == [[0, 1, 2], [5, 6, 7]]
    (equal,) = [one for one in told["verdicts"] if one["claim"] == "equal"]
    used = {done.lab.find(run_id).trial["seed"] for arm in equal["arms"] for run_id in arm["run_ids"]}
    assert used == {5, 6, 7}
    looks = done.of("verdicts.json")["looks"]
    assert [one["seeds"] for one in looks] == [[0, 1, 2], [5, 6, 7]] and looks[0]["verdicts"] != looks[1]["verdicts"]
    again = done.reproduce("--json").json()
    assert again["verdicts"] == told["verdicts"], "the last look is what a study says"
    earlier = done.reproduce("--seeds", "0,1,2", "--json").json()
    assert earlier["verdicts"] == looks[0]["verdicts"] and len(earlier["looks"]) == 2


def test_a_failed_run_ends_with_3_and_decides_nothing(done: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_lab.runner import run

    point = next(one for one in done.of("points.json")["points"] if one["stage"] == "judged")
    shutil.rmtree(done.lab.root / "runs" / point["run_id"])

    def failing(*args: object, **kwargs: object) -> object:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(run, "score_model", failing)
        answer = done.reproduce("--json")
    assert answer.code == 3
    assert said(answer)["equal", "as_published"] == "inconclusive"
