"""A member of a cohort that fails, wherever that is, leaves the others as they would be alone; and is tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.runner import run as runner_run
from lora_lab.runner import training
from lora_lab.train import loop
from tests.journey.program import Lab
from tests.sweep_checks import damages, differences, files_of, result_of

# Of unequal lengths, so that the one that fails has company before, at and after its end; the second is to fail.
_SWEEP = (
    "-m",
    "rank=3,5,7",
    "training.max_steps=9",
    "training.precision=fp64",
    "training.micro_batch_size=2",
    "dropout=0.1",
    "target=all_linear",
)
_FAILING_RANK = 5
_AT_STEP = 4


class InjectedError(Exception):
    """What no part of the lab expects."""


def _is_failing(member: Any) -> bool:
    """Members are known by their run's id only; the rank shows in their weights."""
    return min(member.parameters[0].shape) == _FAILING_RANK


def _in_clipping(patch: pytest.MonkeyPatch) -> None:
    """Before any member of the pass has been updated."""
    clean = loop.clip

    def clip(member: Any) -> Any:
        if _is_failing(member) and member.step == _AT_STEP:
            raise InjectedError
        return clean(member)

    patch.setattr(loop, "clip", clip)


def _in_its_update(patch: pytest.MonkeyPatch) -> None:
    """When some members of the pass have been updated and some have not."""
    clean = loop._finish

    def finish(member: Any, *arguments: Any, **settings: Any) -> Any:
        if _is_failing(member) and member.step == _AT_STEP:
            raise InjectedError
        return clean(member, *arguments, **settings)

    patch.setattr(loop, "_finish", finish)


def _in_its_log(patch: pytest.MonkeyPatch) -> None:
    """After its own update."""
    clean = training.Training.on_step

    def on_step(self: Any, record: Any) -> None:
        if _is_failing(self.member) and record.step == _AT_STEP:
            raise InjectedError
        clean(self, record)

    patch.setattr(training.Training, "on_step", on_step)


def _in_saving(patch: pytest.MonkeyPatch) -> None:
    clean = training.save_adapter

    def save(model: Any, *arguments: Any, **settings: Any) -> Any:
        if model.peft_config["default"].r == _FAILING_RANK:
            raise InjectedError
        return clean(model, *arguments, **settings)

    patch.setattr(training, "save_adapter", save)


def _in_scoring(patch: pytest.MonkeyPatch) -> None:
    clean = runner_run.score_model

    def score(model: Any, *arguments: Any, **settings: Any) -> Any:
        if model.peft_config["default"].r == _FAILING_RANK:
            raise InjectedError
        return clean(model, *arguments, **settings)

    patch.setattr(runner_run, "score_model", score)


def _in_joining(patch: pytest.MonkeyPatch) -> None:
    clean = training.Training.probe

    def probe(self: Any, *arguments: Any, **settings: Any) -> Any:
        if _is_failing(self.member):
            raise InjectedError
        return clean(self, *arguments, **settings)

    patch.setattr(training.Training, "probe", probe)


_PLACES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "joining": _in_joining,
    "clipping": _in_clipping,
    "its update": _in_its_update,
    "its log": _in_its_log,
    "saving": _in_saving,
    "scoring": _in_scoring,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> dict[str, RunRecord]:
    """The runs by themselves, by id."""
    lab = Lab(tmp_path_factory.mktemp("alone"), tiny_cache)
    assert lab.run(*_SWEEP, "launch.cohort=off").code == 0
    return {record.run_id: record for record in lab.runs()}


@pytest.mark.parametrize("place", _PLACES)
def test_a_failing_member(lab: Lab, alone: dict[str, RunRecord], monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    with monkeypatch.context() as patch:
        _PLACES[place](patch)
        answer = lab.run(*_SWEEP, "launch.cohort=3", "launch.checkpoint_seconds=0")
    assert answer.code == 3, answer.err
    runs = {record.trial["rank"]: record for record in lab.runs()}
    failed = runs.pop(_FAILING_RANK)
    assert (failed.state, result_of(failed).reason) == (Status.FAILED, "InjectedError: ")
    assert "InjectedError" in (failed.folder / "traceback.txt").read_text()
    assert [record.state for record in runs.values()] == [Status.COMPLETED] * 2
    _equal_alone(list(runs.values()), alone)
    assert {result_of(record).facts["executed"] for record in runs.values()} == {"cohort"}

    before = {record.run_id: files_of(record.folder) for record in runs.values()}
    assert lab.run(*_SWEEP, "launch.cohort=3").code == 0
    assert {record.run_id: files_of(record.folder) for record in runs.values()} == before
    _equal_alone(lab.runs(), alone)
    resumed = result_of(lab.find(failed.run_id)).facts.get("resumed")
    assert (resumed is None) == (place == "joining"), resumed


def _equal_alone(records: list[RunRecord], alone: dict[str, RunRecord]) -> None:
    assert [problem for record in records for problem in damages(record)] == []
    assert [problem for record in records for problem in differences(record, alone[record.run_id])] == []
