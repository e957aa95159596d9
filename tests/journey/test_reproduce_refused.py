"""What `reproduce` says before it runs anything: plans and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.journey.program import call
from tests.journey.ranks_study import Study, begun, housekeeping


@pytest.fixture
def new(tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The study before anything."""
    monkeypatch.chdir(tmp_path)
    return begun(tmp_path, tiny_cache)


def test_a_dry_run_says_what_would_run_and_writes_nothing(new: Study) -> None:
    answer = new.reproduce("--dry-run", "--json")
    assert answer.code == 0, answer.err
    told = answer.json()
    counts = {one["stage"]: len(one["runs"]) for one in told["stages"]}
    assert counts == {"tuning": 6, "judged": 6, "timing": 6}
    assert told["waiting_for_a_rate"] == 6 and told["seeds"] == [0, 1, 2]
    assert {row["state"] for one in told["stages"] for row in one["runs"]} == {"new"}
    assert not new.lab.root.exists()
    text = new.reproduce("--dry-run")
    assert "tuning: 6 runs, 0 done" in text.out and "6 judged runs wait for the rates" in text.out
    listed = call("reproduce", "--list", "--json", f"root={new.lab.root}").json()
    (own,) = [one for one in listed if one["name"] == "ranks"]
    assert (own["scale"], own["claims"], own["runs"], own["verdicts"]) == ("pocket", 5, 24, {"not run": 5})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("rank",), 'no study "rank"; did you mean "ranks"?'),
        (("ranks", "--scale", "published"), "no published scale"),
        (("ranks", "rank=4"), "rank: would change what the study has fixed"),
        (("ranks", "repeat=1"), "repeat: is given by the study"),
        (("ranks", "root=a,b"), "is a sweep"),
        (("ranks", "--seeds", "5,x"), "expected whole numbers"),
        (("ranks", "--seeds", "5,6,7"), "the first look is at the study's own seeds, 0, 1, 2"),
        (("ranks", "--recorded"), "no records of ranks are kept"),
        (("ranks", "--keep"), "has not been run under"),
        (("ranks", "--keep", "--recorded"), "only one of --recorded, --keep"),
        (("ranks", "--list"), "leave out ranks"),
        ((), "a name is needed"),
    ],
)
def test_what_is_refused(new: Study, arguments: tuple[str, ...], told: str) -> None:
    answer = call("reproduce", *arguments)
    assert answer.code == 2 and told in answer.err
    assert not (new.folder / "lab").exists()


def test_what_is_wrong_with_claims_is_said_before_anything_runs(new: Study) -> None:
    new.edit("large: {rank: 8}", "large: {target: qv}")
    new.edit("metric: heldout/loss\n    arm: large", "metric: heldot/loss\n    arm: large")
    answer = new.reproduce()
    assert answer.code == 2 and "target=qv picks 2 settings" in answer.err and "(claim bigger)" in answer.err
    new.edit("large: {target: qv}", "large: {rank: 8}")
    answer = new.reproduce()
    assert answer.code == 2 and 'no trial of the study is scored on "heldot/loss"; did you mean "heldout"' in answer.err
    assert not new.lab.root.exists()


def test_a_study_with_tuned_points_is_not_a_plain_sweep(new: Study) -> None:
    for command in ("run", "plan"):
        answer = call(command, "-m", "study=ranks", *housekeeping(new.folder, new.cache))
        assert answer.code == 2 and "lora-lab reproduce ranks" in answer.err
