"""Two sweeps in one root at the same time: they share the work, neither repeats the other's, and one may be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from tests.journey.program import Answer, call, lines_of
from tests.kill_loop import Life, SweepFolder, living
from tests.sweep_checks import damages, files_of, result_of

_STUDY = """\
question: Who runs what?
base:
  model: tiny_random
  data.train_size: 16
  data.heldout_size: 8
  evaluation: heldout
  evaluation.answers.rows: 1
  evaluation.answers.max_new_tokens: 4
  training.batch_size: 4
  training.micro_batch_size: 4
  training.max_steps: 60
grids:
  - {rank: RANKS}
"""
_ELSEWHERE = "running in another process"
_DEEP_IN_TRAINING = 5
_PATIENCE_SECONDS = 300.0
# Whoever has not ended after so long with nothing left to do is taken to be waiting.
_WAITING_SECONDS = 8.0


@pytest.fixture
def sweep_of(tmp_path: Path) -> Callable[..., SweepFolder]:
    """sweep_of("left", [1, 2], ...): one trial per rank, in the root and cache of the test, which are not there yet."""

    def make(name: str, ranks: list[int], *overrides: str) -> SweepFolder:
        sweep = SweepFolder(tmp_path, tmp_path / "cache", name, overrides)
        sweep.write_study(_STUDY.replace("RANKS", str(ranks)))
        return sweep

    return make


@pytest.fixture(scope="module")
def two_at_a_time() -> tuple[str, ...]:
    """Keeps a sweep from taking all trials at once, in versions that would."""
    launch = yaml.safe_load(call("run", "--cfg", "job").out)["launch"]
    return ("launch.cohort=2",) if "cohort" in launch else ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks",
    [pytest.param([4, 5, 6, 7], id="overlapping trials"), pytest.param([1, 2, 3, 4, 5], id="same trials")],
)
def test_started_in_the_same_second(sweep_of: Callable[..., SweepFolder], ranks: list[int]) -> None:
    left, right = sweep_of("left", [1, 2, 3, 4, 5]), sweep_of("right", ranks)
    with living(left, "left") as one, living(right, "right") as other:
        answers = one.answer(), other.answer()
    for answer, asked in zip(answers, ([1, 2, 3, 4, 5], ranks), strict=True):
        _says_what_it_left(answer, trials=len(asked))
    records = left.runs()
    assert sorted(record.trial["rank"] for record in records) == sorted({1, 2, 3, 4, 5, *ranks})
    _is_whole(records)
    assert [record.attempts for record in records] == [1] * len(records)
    _nothing_is_left_to_do(left, right)


def test_one_dies_while_the_other_has_work_left(
    sweep_of: Callable[..., SweepFolder], two_at_a_time: tuple[str, ...]
) -> None:
    """What the dead one held is looked at again when the rest is through."""
    sweep = sweep_of("both", [1, 2, 3], *two_at_a_time)
    with living(sweep, "one") as one:
        held = _stopped_in_training(one, sweep)
        with living(sweep, "other") as other:
            _wait_until(lambda: any(lines_of(record.steps_path) for record in _others(sweep, held)), other)
            one.kill()
            answer = other.answer()
    assert answer.code == 0, answer.err
    assert _ELSEWHERE not in answer.err
    _is_whole(sweep.runs())
    assert {record.run_id for record in sweep.runs() if record.attempts == 2} == held
    assert all(record.attempts == 1 for record in _others(sweep, held))
    _nothing_is_left_to_do(sweep)


@pytest.mark.slow
def test_one_dies_while_the_other_waits_or_has_left(
    sweep_of: Callable[..., SweepFolder], two_at_a_time: tuple[str, ...]
) -> None:
    """The first one hangs: who is through with all else says who has the rest, or waits; once the first is dead, its
    runs are anybody's."""
    sweep = sweep_of("both", [1, 2, 3, 4], *two_at_a_time)
    with living(sweep, "one") as one:
        held = _stopped_in_training(one, sweep)
        with living(sweep, "other") as other:
            _wait_until(lambda: len([record for record in _others(sweep, held) if record.is_done]) == 4 - len(held))
            _wait_until(lambda: other.has_ended, at_most=_WAITING_SECONDS)
            holders = {str(record.owner) for record in sweep.runs() if record.run_id in held}
            assert len(holders) == 1 and f"process {one.process.pid} " in holders.pop()
            done = {record.run_id: files_of(record.folder) for record in _others(sweep, held)}
            one.kill()
            answer = other.answer()
    if answer.code == 3:
        _says_what_it_left(answer, trials=4)
        assert all(record.result is None for record in sweep.runs() if record.run_id in held)
    assert _call(sweep).code == 0
    _is_whole(sweep.runs())
    assert {record.run_id for record in sweep.runs() if record.attempts == 2} == held
    assert {record.run_id: files_of(record.folder) for record in _others(sweep, held)} == done
    _nothing_is_left_to_do(sweep)


def _stopped_in_training(life: Life, sweep: SweepFolder) -> set[str]:
    """Stops the process in the midst of its training; the runs that it holds."""
    _wait_until(lambda: any(lines_of(record.steps_path) >= _DEEP_IN_TRAINING for record in sweep.runs()), life)
    os.killpg(life.process.pid, signal.SIGSTOP)
    assert not any(record.is_done for record in sweep.runs())
    return {record.run_id for record in sweep.runs() if record.state == "RUNNING"}


def _others(sweep: SweepFolder, held: set[str]) -> list[RunRecord]:
    return [record for record in sweep.runs() if record.run_id not in held]


def _wait_until(condition: Callable[[], bool], life: Life | None = None, *, at_most: float | None = None) -> None:
    """Returns once `condition` holds, or after `at_most` seconds; fails where `life` ends before, or nothing comes."""
    end = time.monotonic() + (_PATIENCE_SECONDS if at_most is None else at_most)
    while not condition():
        assert life is None or not life.has_ended, life.answer()
        if time.monotonic() > end:
            assert at_most is not None, "waited in vain"
            return
        time.sleep(0.005)


def _says_what_it_left(answer: Answer, *, trials: int) -> None:
    """Either all is done, or every trial that is not is said to be with the other sweep."""
    assert "Traceback" not in answer.err
    rows = answer.json()["rows"]
    open_ = trials - sum(row["completed"] for row in rows)
    said = [line for line in answer.err.splitlines() if _ELSEWHERE in line]
    assert (answer.code, len(said)) == ((3, open_) if open_ else (0, 0)), answer.err
    assert all(set(row["statuses"]) <= {"COMPLETED", "RUNNING"} for row in rows), rows


def _is_whole(records: list[RunRecord]) -> None:
    assert [record.state for record in records] == [Status.COMPLETED] * len(records)
    assert [problem for record in records for problem in damages(record)] == []
    assert [result_of(record).measurements["steps"] for record in records] == [60] * len(records)


def _call(sweep: SweepFolder) -> Answer:
    with contextlib.chdir(sweep.path):
        return call(*sweep.command)


def _nothing_is_left_to_do(*sweeps: SweepFolder) -> None:
    before = {record.run_id: files_of(record.folder) for record in sweeps[0].runs()}
    for sweep in sweeps:
        again = _call(sweep)
        assert again.code == 0 and "nothing to run" in again.err, again.err
    assert {record.run_id: files_of(record.folder) for record in sweeps[0].runs()} == before
