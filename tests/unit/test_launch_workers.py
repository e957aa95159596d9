"""Several devices: who does what, what the parent is told, and what a worker's or the parent's end does to the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lora_lab.app.compose import Composer
from lora_lab.errors import DataError, InputError, MachineError, Problem
from lora_lab.launch import device as devices_module
from lora_lab.launch.device import choose_devices
from lora_lab.launch.worker import Failed, Stopped
from lora_lab.launch.workers import _error_of, _names, _shares, _Worker, run_on_devices
from lora_lab.plan.cohorts import plan_cohorts
from lora_lab.record.ledger import Ledger
from lora_lab.record.watcher import Watchers
from lora_lab.schema.trial import LAB_KEYS, read_lab
from tests import worker_stand_ins as stand_ins
from tests.unit.ledger_samples import digest, trial_of
from tests.unit.test_plan_trials import job
from tests.unit.test_plan_trials import trial_of as real_trial_of
from tests.worker_stand_ins import CPU, PATIENCE_SECONDS, Share, fail, lose_one, run_id, split, wait_for

CHECKOUT = Path(__file__).resolve().parents[2]


class Heard(Watchers):
    """Keeps every call: its name, the run, and what was said."""

    def __init__(self, root: Path | None = None) -> None:
        super().__init__([])
        self.root = root
        self.said: list[tuple[Any, ...]] = []

    def begin(self, total_runs: int) -> None:
        self.said.append(("begin", "", total_runs))

    def run_started(self, header: Any, folder: Path, *, steps: int) -> None:
        self.said.append(("started", header.run_id, folder.name, steps))

    def phase(self, run_id: str, text: str) -> None:
        self.said.append(("phase", run_id, text))

    def step(self, run_id: str, step: int, values: Any) -> None:
        self.said.append(("step", run_id, step, dict(values)))
        if self.root is not None and run_id == stand_ins.run_id(0):
            (self.root / "told-of-first").touch()

    def run_finished(self, header: Any, folder: Path, result: Any) -> None:
        self.said.append(("finished", header.run_id, folder.name, result.facts))

    def of(self, run: str) -> list[tuple[Any, ...]]:
        return [(one[0], *one[2:]) for one in self.said if one[1] == run]


def test_two_workers_share_the_runs_and_all_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    heard = Heard()
    returned = run_on_devices([CPU, CPU], partial(split, tmp_path, 6), heard)
    assert returned.problems == ()
    one, two = returned.values
    assert sorted(one.runs + two.runs) == list(range(6)) and one.runs and two.runs
    assert (one.threads, two.threads) == (3, 2)
    assert len({os.getpid(), one.pid, two.pid}) == 3
    for share in (one, two):
        for seed in share.runs:
            assert heard.of(run_id(seed)) == [
                ("started", run_id(seed), 2),
                ("step", 1, {"loss": 1.0, "seconds": None}),
                ("step", 2, {"loss": 0.5, "seconds": None}),
                ("finished", run_id(seed), {"pid": share.pid}),
            ]
    assert not any(name == "begin" for name, *_ in heard.said), "the sweep begins once, for the parent"


def test_a_single_device_needs_no_process(tmp_path: Path) -> None:
    (tmp_path / "began-other").touch()
    heard = Heard()
    returned = run_on_devices([CPU], partial(split, tmp_path, 2), heard)
    assert returned.values == (Share(os.getpid(), torch.get_num_threads(), (0, 1)),)
    assert [name for name, *_ in heard.said].count("finished") == 2


def test_a_killed_worker_loses_neither_the_others_nor_its_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = Heard(tmp_path)
    returned = run_on_devices([CPU, CPU], partial(lose_one, tmp_path), heard)
    (share,) = returned.values
    assert share.runs == (1, 0)
    (problem,) = returned.problems
    assert problem.where in ("cpu (1)", "cpu (2)") and "killed by SIGKILL" in problem.message
    first = heard.of(run_id(0))
    assert [name for name, *_ in first].count("started") == 2 and first[-1][0] == "finished"
    assert ("phase", f"lost with the worker of {problem.where}") in first
    assert not any(name == "phase" for seed in (1, 2) for name, *_ in heard.of(run_id(seed)))
    record = Ledger(tmp_path).find(digest(trial_of(seed=0)), 0)
    assert record is not None and record.is_done and record.attempts == 2
    assert f"{problem}. The other devices go on." in capfd.readouterr().err


def test_what_one_worker_meets_the_others_need_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kinds = ("machine", "returned", "bug", "exit", "stopped")
    returned = run_on_devices([CPU] * 5, partial(fail, tmp_path, kinds), Heard())
    assert returned.values == ("returned",)
    again = "the same command runs what it has not finished"
    assert sorted(problem.message for problem in returned.problems) == [
        "ZeroDivisionError: by zero",
        "disk: no space left; sorry",
        f"its process ended without a word (exit code 7); {again}",
        f"its process was told to stop (SIGTERM); {again}",
    ]
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1 and ", in fail\n" in told


def test_where_no_worker_returns_the_call_fails(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        run_on_devices([CPU, CPU], partial(fail, tmp_path, ("machine", "machine")), Heard())
    assert [str(problem) for problem in caught.value.problems] == ["disk: no space left", "sorry"], "once, not twice"


DISK = Failed(MachineError, (Problem("disk", "full"),), "")
RANK = Failed(InputError, (Problem("rank", "must be >= 1"),), "")
LENGTH = Failed(DataError, (Problem("data", "0 rows"),), "")
BUG = Failed(None, (Problem("", "KeyError: 'x'"),), "Traceback: ...")


@pytest.mark.parametrize(
    ("ends", "error", "said"),
    [
        ((RANK, RANK), InputError, "rank: must be >= 1"),
        ((RANK, LENGTH), InputError, "0: rank: must be >= 1\n1: data: 0 rows"),
        ((RANK, DISK), MachineError, "0: rank: must be >= 1\n1: disk: full"),
        ((DISK, Stopped()), MachineError, "0: disk: full\n1: "),
        ((BUG, DISK), RuntimeError, "0: KeyError: 'x'\n1: disk: full\nTraceback: ..."),
    ],
)
def test_the_error_where_no_worker_returned(ends: Sequence[Any], error: type[Exception], said: str) -> None:
    class Ended(_Worker):
        def __init__(self, name: str, end: Any) -> None:
            self.name, self.end = name, end

    raised = _error_of([Ended(str(number), end) for number, end in enumerate(ends)])
    assert type(raised) is error and str(raised).startswith(said)


class Program:
    """A process of its own around two workers that work until they are interrupted (tests/worker_stand_ins.py)."""

    def __init__(self, root: Path, *, seconds_to_end: float) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker_stand_ins", str(root), str(seconds_to_end)],
            cwd=CHECKOUT,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.workers: list[psutil.Process] = []

    def __enter__(self) -> Program:
        wait_for(self.root, "there-*", 2)
        self.workers = [psutil.Process(int(path.name.partition("-")[2])) for path in self.root.glob("there-*")]
        return self

    def __exit__(self, *_: object) -> None:
        for one in (*self.workers, self.process):
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        """Exit code and stderr, once it and its workers are gone."""
        _, told = self.process.communicate(timeout=PATIENCE_SECONDS)
        _, alive = psutil.wait_procs(self.workers, timeout=5)
        assert not alive
        return self.process.returncode, told

    def logs(self) -> list[str]:
        return [path.read_text() for path in sorted(self.root.glob("worker-*"))]

    def log(self, name: str) -> str:
        path = self.root / name
        return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C in a terminal
        # `timeout`: to its child, then to the whole group
        pytest.param(signal.SIGTERM, True, -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, -signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["Ctrl-C", "SIGTERM to all", "SIGTERM"],
)
def test_signals_reach_the_workers_once(tmp_path: Path, number: int, to_all: bool, code: int) -> None:
    with Program(tmp_path, seconds_to_end=0.5) as program:
        if number == signal.SIGTERM and to_all:
            program.process.send_signal(number)
            wait_for(tmp_path, "worker-*", 2)
        (os.killpg if to_all else os.kill)(program.process.pid, number)
        assert program.end() == (code, "")
        assert program.logs() == ["interrupted\nended\n"] * 2, "each once, and each was waited for"
        assert program.log("heard") == "finished\n" * 2, "what they told on their way out was heard"
        assert program.log("ended") == ("KeyboardInterrupt" if number == signal.SIGINT else "")


def test_a_second_signal_ends_workers_that_take_too_long(tmp_path: Path) -> None:
    with Program(tmp_path, seconds_to_end=PATIENCE_SECONDS * 2) as program:
        os.kill(program.process.pid, signal.SIGINT)
        wait_for(tmp_path, "worker-*", 2)
        time.sleep(1.1)
        os.kill(program.process.pid, signal.SIGINT)
        assert program.end() == (130, "")
        assert program.logs() == ["interrupted\n"] * 2


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    with Program(tmp_path, seconds_to_end=0.0) as program:
        program.process.kill()
        assert program.end()[0] == -signal.SIGKILL
        assert program.logs() == [], "nor do they take their leave"
        assert {one.state for one in Ledger(tmp_path).runs()} == {"INTERRUPTED"}, "their runs are free again"


# Which devices, their names, their threads.


def test_auto_is_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, names in ((0, ["cpu"]), (1, ["cuda"]), (3, ["cuda:0", "cuda:1", "cuda:2"])):
        monkeypatch.setattr(devices_module.torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(devices_module.torch.cuda, "is_available", lambda count=count: count > 0)
        assert [str(one) for one in choose_devices("auto")] == names
    assert [str(one) for one in choose_devices(("cuda:2", "cpu"))] == ["cuda:2", "cpu"]
    assert [str(one) for one in choose_devices("cpu")] == ["cpu"]
    with pytest.raises(MachineError, match="cuda:3: 3 CUDA devices here"):
        choose_devices(("cuda:0", "cuda:3"))


def test_names_and_shares() -> None:
    mixed = [torch.device(name) for name in ("cuda:0", "cpu", "cuda:1", "cpu")]
    assert _names(mixed) == ["cuda:0", "cpu (1)", "cuda:1", "cpu (2)"]
    assert [_shares(*one) for one in ((8, 2), (7, 3), (1, 4))] == [[4, 4], [3, 2, 2], [1, 1, 1, 1]]


def test_what_a_worker_is_handed_can_be_sent(composer: Composer) -> None:
    jobs = [job(real_trial_of(rank=rank)) for rank in (4, 8)]
    cohorts = plan_cohorts(jobs, cohort="auto")
    mapping = composer.compose(["launch.device=[cpu,cpu]", "launch.cohort=off"]).mapping
    lab = read_lab({key: mapping[key] for key in LAB_KEYS})
    for handed in (jobs, cohorts, lab, Path("cache"), CPU):
        assert ForkingPickler.loads(bytes(ForkingPickler.dumps(handed))) == handed
