"""Sweeps that are killed, interrupted, doubled, repeated and failed: nothing is lost, nothing is trained twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from lora_lab.app.cli import main
from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import read_steps
from tests.journey.program import Answer, Lab, lines_of, metrics_of, own_logging, wait_until
from tests.stepping import poison

# Four trials, long enough for a signal to meet one in the middle of its training.
SWEEP = ("-m", "rank=4,8", "seed=0,1", "training.max_steps=100", "dropout=0.1", "launch.cohort=off")
_DEEP_IN_TRAINING = 5


@dataclass(frozen=True)
class Disturbed:
    """A sweep killed while its second run trained, begun again, interrupted in its third, and then let finish."""

    lab: Lab
    first: RunRecord
    first_files: dict[str, tuple[bytes, int]]
    killed: RunRecord
    killed_steps: list[dict[str, Any]]
    interrupted: Answer
    after_interruption: list[RunRecord]
    final: Answer


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Disturbed:
    """The whole story, once."""
    lab = Lab(tmp_path_factory.mktemp("disturbed"), tiny_cache)
    process = lab.start(*SWEEP)
    wait_until(lambda: _is_in_run(lab, done=1), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    done, begun = _parts(lab)
    (first,), (killed,) = done, begun
    first_files = _files(first.folder)
    killed_steps = read_steps(killed.steps_path)
    process = lab.start(*SWEEP, "--json")
    wait_until(lambda: _is_in_run(lab, done=2), process)
    process.send_signal(signal.SIGINT)
    interrupted = _finished(process)
    after = lab.runs()
    final = lab.run(*SWEEP, "--json")
    return Disturbed(lab, first, first_files, killed, killed_steps, interrupted, after, final)


def test_a_killed_run_is_left_as_it_stood(disturbed: Disturbed) -> None:
    assert disturbed.killed.result is None
    assert disturbed.killed.state == Status.INTERRUPTED
    assert disturbed.killed.attempts == 1
    assert _DEEP_IN_TRAINING <= len(disturbed.killed_steps) < 100


def test_finished_trials_are_not_repeated(disturbed: Disturbed) -> None:
    assert _files(disturbed.first.folder) == disturbed.first_files


def test_a_killed_run_is_tried_again_and_its_files_are_kept(disturbed: Disturbed) -> None:
    folder = disturbed.killed.folder
    assert _result(folder).attempt == 2
    assert _result(folder).status == Status.COMPLETED
    assert read_steps(folder / "attempts" / "1" / "steps.jsonl") == disturbed.killed_steps
    assert json.loads((folder / "attempts" / "1" / "trial.json").read_text())["attempt"] == 1
    assert [line["step"] for line in read_steps(folder / "steps.jsonl")] == list(range(1, 101))


def test_ctrl_c_is_recorded_and_answered_with_130(disturbed: Disturbed) -> None:
    assert disturbed.interrupted.code == 130
    assert "continues where this one stopped" in disturbed.interrupted.err
    assert "Traceback" not in disturbed.interrupted.err
    assert disturbed.interrupted.out == ""
    states = [record.state for record in disturbed.after_interruption]
    assert states == [Status.COMPLETED, Status.COMPLETED, Status.INTERRUPTED]
    result = disturbed.after_interruption[-1].result
    assert result is not None, "Ctrl-C leaves a result, other than SIGKILL"
    assert result.status == Status.INTERRUPTED
    assert result.measurements["wall_seconds"] > 0


def test_the_table_is_complete_and_equals_that_of_an_undisturbed_sweep(disturbed: Disturbed, lab: Lab) -> None:
    assert disturbed.final.code == 0, disturbed.final.err
    undisturbed = lab.run(*SWEEP, "--json")
    assert undisturbed.code == 0
    assert metrics_of(disturbed.final.json()) == metrics_of(undisturbed.json())
    assert [row["completed"] for row in undisturbed.json()["rows"]] == [2, 2]
    again = {record.run_id: record.result for record in lab.runs()}
    for record in disturbed.lab.runs():
        assert record.result is not None
        assert _metric_bytes(record.result) == _metric_bytes(again[record.run_id])
        assert _curve(record) == _curve(next(other for other in lab.runs() if other.run_id == record.run_id))


def test_a_second_call_trains_nothing(disturbed: Disturbed) -> None:
    before = {record.run_id: _files(record.folder) for record in disturbed.lab.runs()}
    again = disturbed.lab.run(*SWEEP, "--json")
    assert again.code == 0
    assert "nothing to run" in again.err
    assert again.json() == disturbed.final.json()
    assert {record.run_id: _files(record.folder) for record in disturbed.lab.runs()} == before


@pytest.mark.slow
def test_two_sweeps_started_in_the_same_second_share_the_work(lab: Lab) -> None:
    sweep = ("-m", "seed=0,1,2", "training.max_steps=60", "--json")
    processes = [lab.start(*sweep) for _ in range(2)]
    answers = [_finished(process) for process in processes]
    assert all(answer.code in (0, 3) for answer in answers), answers
    for answer in answers:
        assert "Traceback" not in answer.err
        assert answer.code == 0 or "running in another process" in answer.err
    runs = lab.runs()
    assert [record.state for record in runs] == [Status.COMPLETED] * 3
    assert [record.attempts for record in runs] == [1] * 3
    assert [lines_of(record.steps_path) for record in runs] == [60] * 3
    started = [
        line for answer in answers for line in answer.err.splitlines() if line.startswith("[") and " started" in line
    ]
    assert len(started) == 3
    assert max(answers, key=lambda one: one.json()["rows"][0]["completed"]).json()["rows"][0]["completed"] == 3


def test_equal_points_are_one_training(lab: Lab) -> None:
    answer = lab.run("-m", "rank=8,8", "--json")
    assert answer.code == 0
    assert lab.only().attempts == 1
    assert [row["runs"] for row in answer.json()["rows"]] == [1]


def test_repeat_measures_an_equal_trial_again(lab: Lab) -> None:
    answer = lab.run("-m", "repeat=0,1", "--json")
    first, second = lab.runs()
    assert second.run_id == f"{first.run_id}.r1"
    assert first.result is not None and second.result is not None
    assert first.result.fingerprint == second.result.fingerprint
    assert _metric_bytes(first.result) == _metric_bytes(second.result)
    assert (first.result.repeat, second.result.repeat) == (0, 1)
    (row,) = answer.json()["rows"]
    assert row["runs"] == 2
    assert len(row["metrics"]["heldout/loss"]["points"]) == 1, "the same score measured twice is one score"


class Failing:
    """`attach`, which every run calls once, failing where `fails` says so, and counting its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
        from lora_lab.runner import run

        self.calls = 0
        self._fails = fails
        self._attach = run.attach
        monkeypatch.setattr(run, "attach", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self._fails(self.calls):
            raise RuntimeError("injected")
        return self._attach(*args, **kwargs)


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Failing(patch, lambda call: call == 1)
        answer = lab.run("-m", "seed=0,1,2", "--json")
    assert answer.code == 3
    failed, *others = lab.runs()
    assert failed.state == Status.FAILED
    assert failed.result is not None and failed.result.reason == "RuntimeError: injected"
    assert "injected" in (failed.folder / "traceback.txt").read_text()
    assert [record.state for record in others] == [Status.COMPLETED] * 2
    (row,) = answer.json()["rows"]
    assert row["statuses"] == {"FAILED": 1, "COMPLETED": 2}
    assert row["reasons"] == ["lora-r8-qv-s0: FAILED: RuntimeError: injected"]
    assert {point["seed"] for point in row["metrics"]["heldout/loss"]["points"]} == {1, 2}

    again = lab.run("-m", "seed=0,1,2", "--json")
    assert again.code == 0
    assert [record.attempts for record in sorted(lab.runs(), key=lambda one: one.name)] == [2, 1, 1]
    assert (failed.folder / "attempts" / "1" / "traceback.txt").exists()
    assert not (failed.folder / "traceback.txt").exists()


def test_retries_are_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, lambda call: call <= 2)
    assert lab.run("launch.retries=2").code == 0
    assert failing.calls == 3
    record = lab.only()
    assert record.result is not None
    assert (record.result.attempt, record.result.status) == (3, Status.COMPLETED)
    assert sorted(path.name for path in (record.folder / "attempts").iterdir()) == ["1", "2"]


def test_retries_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, lambda call: True)
    assert lab.run("launch.retries=1").code == 3
    assert failing.calls == 2
    assert lab.only().state == Status.FAILED


def test_fail_fast_leaves_the_rest_out(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, lambda call: call == 2)
    answer = lab.run("-m", "seed=0,1,2,3", "fail_fast=true")
    assert answer.code == 3
    assert [record.state for record in lab.runs()] == [Status.COMPLETED, Status.FAILED]
    assert "2 runs left out" in answer.err


@pytest.mark.parametrize("cause", ["rate", "nan"])
def test_a_diverging_run_ends_with_finite_weights(lab: Lab, monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    """Either a learning rate that throws the weights out of range, or a loss that is NaN at the third step."""
    points = ["seed=0,1", "training.max_steps=12"]
    if cause == "rate":
        points += ["optimizer=sgd", "learning_rate=1e30", "target=head"]  # hidden states are normalised, logits not
    else:
        _poison(monkeypatch, step=2)
    answer = lab.run("-m", *points, "--json")
    assert answer.code == 3
    for record in lab.runs():
        assert record.result is not None
        assert record.result.status == Status.DIVERGED
        steps = read_steps(record.steps_path)
        assert 0 < len(steps) < 12
        assert record.result.measurements["steps"] == len(steps)
        assert str(record.result.reason).startswith(f"step {len(steps) + 1}: loss ")
        assert "heldout/loss" not in record.result.metrics
        weights = load_file(record.adapter_folder / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    (row,) = answer.json()["rows"]
    assert row["statuses"] == {"DIVERGED": 2}
    assert all(cell["mean"] is None and not cell["points"] for cell in row["metrics"].values())

    assert lab.run("-m", *points).code == 3
    assert [record.attempts for record in lab.runs()] == [1, 1], "to diverge is an answer, not tried again"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("last", [False, True], ids=["on the way", "at the last step"])
def test_weights_that_are_not_finite_are_not_saved(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, method: str, last: bool
) -> None:
    clean = torch.optim.SGD.step
    calls: list[int] = []

    def step(self: torch.optim.SGD, *args: Any) -> Any:
        outcome = clean(self, *args)
        if isinstance(self.param_groups[0]["params"][0], FakeTensor):
            return outcome  # a step that is predicted
        calls.append(1)
        if len(calls) == 4:  # the first two are the memory probe's
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))
        return outcome

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    steps = 2 if last else 5
    assert lab.run(f"method={method}", "optimizer=sgd", f"training.max_steps={steps}").code == 3
    record = lab.only()
    assert record.result is not None
    assert record.result.status == Status.DIVERGED, record.result.reason
    kept = "adapter_file_bytes" if method == "lora" else "model_file_bytes"
    assert record.result.missing[kept] == "not saved: the weights hold NaN or Inf"
    assert not record.adapter_folder.exists() and not record.model_folder.exists()
    assert len(read_steps(record.steps_path)) == 2


def _poison(monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    poison(monkeypatch, lambda member: member.step == step)


def test_a_diverged_run_is_not_averaged_with_its_setting(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.run("seed=0").code == 0
    _poison(monkeypatch, step=1)
    (row,) = lab.run("-m", "seed=0,1", "--json").json()["rows"]
    assert row["statuses"] == {"COMPLETED": 1, "DIVERGED": 1}
    assert [point["seed"] for point in row["metrics"]["heldout/loss"]["points"]] == [0]
    assert row["reasons"][0].startswith("lora-r8-qv-s1: DIVERGED: step 2: loss nan")


def test_a_sweep_goes_on_when_who_read_its_progress_has_left(lab: Lab) -> None:
    """As in `lora-lab run ... 2>&1 | head`: a closed pipe is no reason to lose a training."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stderr(stream), own_logging():
        assert main(["run", *lab.tiny()]) == 0
    assert lab.only().state == Status.COMPLETED


def test_a_machine_that_refuses_stops_the_sweep(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = Lab(tmp_path / "file", lab.cache).run("-m", "seed=0,1")
    assert answer.code == 4 and "root is a file" in answer.err
    answer = Lab(lab.root, tmp_path / "file").run("-m", "seed=0,1")
    assert answer.code == 4 and str(tmp_path / "file") in answer.err
    assert lab.runs() == []


def test_max_runs_is_asked_before_anything_runs(lab: Lab) -> None:
    answer = lab.run("-m", "seed=range(0,50)", "max_runs=49")
    assert answer.code == 2
    assert "50 runs; limit 49; pass max_runs=50" in answer.err
    assert not lab.root.exists()


def _is_in_run(lab: Lab, *, done: int) -> bool:
    """Whether exactly `done` runs have a result and the next one is some steps into its training."""
    finished, begun = _parts(lab)
    return len(finished) == done and any(lines_of(one.steps_path) >= _DEEP_IN_TRAINING for one in begun)


def _parts(lab: Lab) -> tuple[list[RunRecord], list[RunRecord]]:
    runs = lab.runs()
    return [one for one in runs if one.result is not None], [one for one in runs if one.result is None]


def _finished(process: subprocess.Popen[str]) -> Answer:
    out, err = process.communicate(timeout=180)
    return Answer(process.returncode, out, err)


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file of a run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def _result(folder: Path) -> Result:
    return Result.model_validate_json((folder / "result.json").read_bytes())


def _metric_bytes(result: Result | None) -> str:
    assert result is not None
    return json.dumps({name: metric.model_dump() for name, metric in result.metrics.items()}, sort_keys=True)


def _curve(record: RunRecord) -> list[tuple[float, ...]]:
    keys = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "loss_tokens")
    return [tuple(line[key] for key in keys) for line in read_steps(record.steps_path)]
