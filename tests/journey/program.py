"""The program as its users call it: in this process where only the answer matters, else as a process of its own."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_lab.app.cli import main
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord

CHECKOUT = Path(__file__).resolve().parents[2]

# The smallest trial that goes all the way. Values given by a test stand in for those of the same key here.
TINY = {
    "model": "tiny_random",
    "data.train_size": "16",
    "data.heldout_size": "8",
    "training.batch_size": "4",
    "training.micro_batch_size": "4",
    "training.max_steps": "2",
    "evaluation.tasks": "[]",
    "evaluation.answers.rows": "1",
    "evaluation.answers.max_new_tokens": "4",
    "tracking": "off",
}


@dataclass(frozen=True)
class Answer:
    """What a call left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The answer of a call with --json."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Lab:
    """A lab's folder, and the program working on it. `cache` is shared, so that a model is made once."""

    root: Path
    cache: Path

    def run(self, *arguments: str) -> Answer:
        """`run` on the tiny model; flags and overrides as on the command line."""
        return call("run", *self.tiny(*arguments))

    def plan(self, *arguments: str) -> Answer:
        """`plan` on the tiny model."""
        return call("plan", *self.tiny(*arguments))

    def ask(self, command: str, *arguments: str) -> Answer:
        """A command that reads the ledger."""
        return call(command, *arguments, "--root", str(self.root))

    def load(self, command: str, *arguments: str) -> Answer:
        """A command that loads a model of the ledger."""
        return self.ask(command, *arguments, "--cache", str(self.cache))

    def tiny(self, *arguments: str) -> list[str]:
        """`arguments` and what they leave open of TINY, root and cache."""
        given = {argument.partition("=")[0] for argument in arguments}
        if "data=jsonl" in arguments:
            given.add("data.train_size")  # of generated rows only
        missing = [f"{key}={value}" for key, value in TINY.items() if key not in given]
        return [*arguments, *missing, f"root='{self.root}'", f"cache='{self.cache}'"]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`run` in a process of its own, on one core."""
        return subprocess.Popen(
            [sys.executable, "-m", "lora_lab.app.cli", "run", *self.tiny(*arguments)],
            env=process_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def runs(self) -> list[RunRecord]:
        """Every run of the ledger."""
        return Ledger(self.root).runs()

    def find(self, name: str) -> RunRecord:
        """The run of that name."""
        return Ledger(self.root).resolve(name)

    def only(self) -> RunRecord:
        """The one run of the ledger."""
        (record,) = self.runs()
        return record


def call(*arguments: str) -> Answer:
    """One call of the program in this process; argparse and Hydra may end it by SystemExit."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), own_logging():
        try:
            code: Any = main(list(arguments))
        except SystemExit as leaving:
            code = 0 if leaving.code is None else leaving.code
    return Answer(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """torch on one thread within the block, and what exists before it left out of garbage collection."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # the runner collects after each run, and there is much of pytest and torch that stays
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """Hydra adds handlers and switches other loggers off for the rest of the process; here only for the call."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    _switch_on()
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        _switch_on()


def _switch_on() -> None:
    for one in logging.root.manager.loggerDict.values():
        if isinstance(one, logging.Logger):
            one.disabled = False


def process_environment(**more: str) -> dict[str, str]:
    """For subprocesses: this checkout's package, one core."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def python(code: str, *arguments: str, cwd: Path | None = None) -> Answer:
    """`python -c CODE ARGUMENTS` as a process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=process_environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 120) -> None:
    """Returns once `condition` holds; fails where the process ends before, or time runs out."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def metrics_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a table as JSON what must be the same however the sweep went: names, axes, scores, counts; not times."""
    kept = ("name", "setting", "axes", "runs", "completed", "statuses", "reasons", "trainable_parameters", "metrics")
    return [{key: row[key] for key in kept} for row in table["rows"]]


def lines_of(path: Path) -> int:
    """Complete lines of a file; 0 where it is not there."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
