"""Sweeps as cohorts: who sits where, what is shared, what goes wrong for one and not for the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import read_steps
from lora_lab.runner import cohort as cohort_module
from lora_lab.runner.seats import MemoryBudget
from lora_lab.train.loop import gather
from lora_lab.train.member import Member
from tests.journey.program import Lab
from tests.stepping import poison

pytestmark = pytest.mark.usefixtures("one_core")
FOUR = ("-m", "seed=0,1,2,3", "training.max_steps=4")


def losses(record: RunRecord) -> list[float]:
    return [line["loss"] for line in read_steps(record.steps_path)]


def by_name(lab: Lab) -> dict[str, RunRecord]:
    return {record.name: record for record in lab.runs()}


def facts(record: RunRecord) -> Any:
    assert record.result is not None, record.problem
    return record.result.facts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Any) -> dict[str, list[float]]:
    """The losses of the four runs, each trained by itself."""
    lab = Lab(tmp_path_factory.mktemp("alone"), tiny_cache)
    assert lab.run(*FOUR, "launch.cohort=off").code == 0
    assert all(facts(record)["executed"] == "alone" and "cohort" not in facts(record) for record in lab.runs())
    return {record.name: losses(record) for record in lab.runs()}


def same(found: Sequence[float], expected: Sequence[float]) -> bool:
    return len(found) == len(expected) and all(abs(a - b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_members_have_what_is_theirs_and_the_cohort_what_is_shared(lab: Lab, alone: dict[str, list[float]]) -> None:
    assert lab.run(*FOUR).code == 0
    runs = by_name(lab)
    ids = {record.run_id for record in runs.values()}
    assert len({facts(record)["cohort"]["id"] for record in runs.values()}) == 1
    for name, record in runs.items():
        assert record.result is not None and record.result.status == Status.COMPLETED
        assert facts(record)["executed"] == "cohort" and facts(record)["cohort"]["seats"] == 4
        assert set(facts(record)["cohort"]["members"]) == ids
        measured, missing = record.result.measurements, record.result.missing
        for shared in ("train_seconds", "step_seconds", "tokens_per_second", "wall_seconds", "train_peak_rss_bytes"):
            assert shared not in measured
        for shared in ("train_seconds", "tokens_per_second", "wall_seconds"):
            assert "launch.cohort=off repeat=1" in missing[shared]
        assert measured["cohort_tokens_per_second"] > 0 and measured["cohort_train_seconds"] > 0
        assert measured["padding_fraction"] == 0 and measured["steps"] == 4
        assert all("seconds" not in line for line in read_steps(record.steps_path))
        assert same(losses(record), alone[name])
        assert not (record.folder / "checkpoint").exists()


def test_seats_are_taken_in_turn(lab: Lab, alone: dict[str, list[float]]) -> None:
    assert lab.run(*FOUR, "launch.cohort=2").code == 0
    for name, record in by_name(lab).items():
        assert facts(record)["cohort"]["seats"] == 2 and len(facts(record)["cohort"]["members"]) == 2
        assert same(losses(record), alone[name])


def test_the_base_is_loaded_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a cohort, and by runs that cannot sit in one; a method that trains the base's own weights takes them along."""
    from lora_lab import restore

    load, calls = restore.load_base, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(restore, "load_base", counted)
    assert lab.run("-m", "method=lora,ia3,bottleneck", "seed=0,1").code == 0
    assert len(calls) == 1
    assert lab.run("-m", "method=full", "seed=0,1").code == 0
    assert len(calls) == 3


def test_memory_decides_how_many_sit_down(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, alone: dict[str, list[float]]
) -> None:
    """A budget for one member and a half: never two at once."""
    most: list[int] = []
    note = MemoryBudget.note

    def tight(self: MemoryBudget, run_id: str, needed_bytes: int) -> None:
        self.limit_bytes = needed_bytes * 3 // 2
        note(self, run_id, needed_bytes)

    tick = cohort_module.tick

    def counted(forward: Any, members: Sequence[Member], **rest: Any) -> int:
        most.append(len(members))
        return tick(forward, members, **rest)

    monkeypatch.setattr(MemoryBudget, "note", tight)
    monkeypatch.setattr(cohort_module, "tick", counted)
    assert lab.run(*FOUR, "launch.cohort=4").code == 0
    assert most == [1] * 16
    for name, record in by_name(lab).items():
        assert same(losses(record), alone[name])


def failing_tick(monkeypatch: pytest.MonkeyPatch, fails: Any) -> list[int]:
    """`tick` that raises what `fails(members)` gives; returns the sizes of the passes that went through."""
    tick, sizes = cohort_module.tick, []

    def raising(forward: Any, members: Sequence[Member], **rest: Any) -> int:
        error = fails(members)
        if error is None:
            tokens = tick(forward, members, **rest)
            sizes.append(len(members))
            return tokens
        gather(forward, members)  # gradients are there when it fails
        raise error

    monkeypatch.setattr(cohort_module, "tick", raising)
    return sizes


def test_a_pass_that_is_too_large_is_halved(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, alone: dict[str, list[float]]
) -> None:
    sizes = failing_tick(monkeypatch, lambda members: torch.OutOfMemoryError("full") if len(members) > 2 else None)
    assert lab.run(*FOUR, "launch.cohort=4").code == 0
    assert sizes == [2] * 8
    for name, record in by_name(lab).items():
        assert same(losses(record), alone[name])


def test_a_member_that_fails_is_the_only_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, alone: dict[str, list[float]]
) -> None:
    """At its third step, with gradients of all in their places."""
    guilty: list[str] = []

    def fails(members: Sequence[Member]) -> Exception | None:
        if not guilty:
            guilty.append(members[1].name)
        hit = any(member.name == guilty[0] and member.step == 2 for member in members)
        return RuntimeError("injected") if hit else None

    failing_tick(monkeypatch, fails)
    assert lab.run(*FOUR, "launch.cohort=4").code == 3
    for name, record in by_name(lab).items():
        if record.run_id == guilty[0]:
            assert record.result is not None and record.result.status == Status.FAILED
            assert record.result.reason == "RuntimeError: injected"
        else:
            assert same(losses(record), alone[name])
    monkeypatch.undo()
    assert lab.run(*FOUR, "launch.cohort=4").code == 0
    (again,) = [record for record in lab.runs() if record.run_id == guilty[0]]
    assert same(losses(again), alone[again.name])


def test_a_member_that_diverges_is_the_only_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, alone: dict[str, list[float]]
) -> None:
    poison(monkeypatch, lambda member: member.step == 2 and member.dropout_clock is not None)
    answer = lab.run("-m", "seed=0,1", "dropout=0,0.1", *FOUR[2:], "launch.cohort=8")
    assert answer.code == 3
    for record in lab.runs():
        if record.trial["dropout"]:
            assert record.state == Status.DIVERGED and len(losses(record)) == 2
        else:
            assert record.state == Status.COMPLETED and same(losses(record), alone[record.name])


def test_a_search_ends_who_falls_behind_and_goes_on_without_the_rule(lab: Lab) -> None:
    sweep = ("-m", "learning_rate=1e-5,1e-3,1e-2,3e-2", "training.max_steps=9")
    answer = lab.run(*sweep, "launch.stopping.rule=halving", "launch.stopping.halving={points: 1, reduction: 2}")
    assert answer.code == 0, answer.err
    runs = lab.runs()
    stopped = [record for record in runs if record.state == Status.STOPPED]
    assert len(stopped) == 2 and len(runs) == 4
    for record in stopped:
        assert facts(record)["stopping"]["step"] == 5 and len(losses(record)) == 5
        assert record.result is not None and "heldout/loss" not in record.result.metrics
    kept = {record.run_id: losses(record) for record in stopped}
    again = lab.run(*sweep, "launch.stopping.rule=halving", "launch.stopping.halving={points: 1, reduction: 2}")
    assert again.code == 0 and {record.attempts for record in lab.runs()} == {1}
    assert lab.run(*sweep).code == 0
    for run_id, early in kept.items():
        record = lab.find(run_id)
        assert record.state == Status.COMPLETED and len(losses(record)) == 9
        assert losses(record)[:5] == early and facts(record)["resumed"] == {"attempt": 1, "step": 5}


def test_two_devices_share_the_runs(lab: Lab, alone: dict[str, list[float]]) -> None:
    """Two worker processes on the CPU; leases between them."""
    answer = lab.run("-m", "seed=0,1", *FOUR[2:], "launch.device=[cpu,cpu]", "launch.cohort=1")
    assert answer.code == 0, answer.err
    for name, record in by_name(lab).items():
        assert record.attempts == 1 and same(losses(record), alone[name])


def test_the_plan_says_who_sits_together(lab: Lab) -> None:
    rows = json.loads(lab.plan("-m", "method=lora,full", "seed=0,1", "--json").out)
    together = [row for row in rows if row["name"].startswith("lora")]
    assert {row["cohort_size"] for row in together} == {2} and len({row["cohort"] for row in together}) == 1
    assert all("trains weights of the base" in row["why_alone"] for row in rows if row["name"].startswith("full"))
