"""Work for `launch/workers.py` to spread over devices, and a script around it: top-level functions, without pytest."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_lab.errors import MachineError, Problem
from lora_lab.launch.workers import run_on_devices
from lora_lab.record.ledger import Ledger, run_id_of
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.watcher import Watcher, Watchers
from tests.unit.ledger_samples import claim, digest, result_of, trial_of

CPU = torch.device("cpu")
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Share:
    """What a worker did. runs: their seeds."""

    pid: int
    threads: int
    runs: tuple[int, ...]


def run_id(seed: int) -> str:
    return run_id_of(digest(trial_of(seed=seed)), 0)


def wait_for(folder: Path, pattern: str, count: int) -> None:
    """Until so many files are there; raises after a minute, so that a test that is broken ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(folder.glob(pattern))) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} of {pattern}")
        time.sleep(0.01)


def finish(folder: RunFolder, watcher: Watcher) -> None:
    for step in (1, 2):
        watcher.step(folder.run_id, step, {"loss": 1.0 / step, "seconds": None})
    result = result_of(folder, facts={"pid": os.getpid()})
    folder.write_result(result)
    watcher.run_finished(folder.header, folder.path, result)


def split(root: Path, runs: int, device: torch.device, watcher: Watcher) -> Share:
    """Runs what is free; no worker ends its first run before both have begun one."""
    watcher.begin(99)
    mine: list[int] = []
    for seed in range(runs):
        folder = claim(Ledger(root), trial_of(seed=seed))
        if folder is None:
            continue
        with folder:
            watcher.run_started(folder.header, folder.path, steps=2)
            (root / f"began-{os.getpid()}").touch()
            wait_for(root, "began-*", 2)
            finish(folder, watcher)
        mine.append(seed)
    return Share(os.getpid(), torch.get_num_threads(), tuple(mine))


def is_first(folder: Path) -> bool:
    """True in the one process that asks first."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def lose_one(root: Path, device: torch.device, watcher: Watcher) -> Share:
    """Who has the first run ends another, and is killed; the other worker ends the second, and then takes the first."""
    mine: list[int] = []
    if is_first(root / "victim"):
        first = claim(Ledger(root), trial_of(seed=0))
        assert first is not None
        own = claim(Ledger(root), trial_of(seed=2))
        assert own is not None
        with own:
            watcher.run_started(own.header, own.path, steps=2)
            finish(own, watcher)
        watcher.run_started(first.header, first.path, steps=2)
        watcher.step(first.run_id, 1, {"loss": 1.0})
        (root / "has-first").touch()
        wait_for(root, "told-of-first", 1)  # the parent has heard of it
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for(root, "has-first", 1)
    for seed in (1, 0):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (folder := claim(Ledger(root), trial_of(seed=seed))) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert folder is not None
        with folder:
            watcher.run_started(folder.header, folder.path, steps=2)
            finish(folder, watcher)
        mine.append(seed)
    return Share(os.getpid(), torch.get_num_threads(), tuple(mine))


def fail(root: Path, kinds: tuple[str, ...], device: torch.device, watcher: Watcher) -> str:
    """Ends, in each of as many workers, in another of these ways."""
    kind = next(kind for number, kind in enumerate(kinds) if is_first(root / f"taken-{number}"))
    if kind == "machine":
        raise MachineError([Problem("disk", "no space left"), Problem("", "sorry")])
    if kind == "bug":
        raise ZeroDivisionError("by " + "zero")
    if kind == "exit":
        os._exit(7)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE_SECONDS)
    return kind


def work_until_interrupted(root: Path, seconds_to_end: float, device: torch.device, watcher: Watcher) -> None:
    """Says that it is there; when it is interrupted, says so, takes its time, and tells its watcher."""
    own = root / f"worker-{os.getpid()}"
    folder = claim(Ledger(root), trial_of(seed=os.getpid()))
    assert folder is not None
    try:
        watcher.run_started(folder.header, folder.path, steps=0)
        (root / f"there-{os.getpid()}").touch()
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        with own.open("a") as log:
            log.write("interrupted\n")
        time.sleep(seconds_to_end)
        watcher.run_finished(folder.header, folder.path, result_of(folder))
        with own.open("a") as log:
            log.write("ended\n")
        raise


class Log(Watchers):
    """Writes what it is told into a file."""

    def __init__(self, path: Path) -> None:
        super().__init__([])
        self._path = path

    def run_finished(self, *arguments: Any) -> None:
        with self._path.open("a") as log:
            log.write("finished\n")


def main(root: Path, seconds_to_end: float) -> None:
    """A program around two workers; what it is told of goes to `heard`, and how it ended to `ended`."""
    try:
        run_on_devices([CPU, CPU], partial(work_until_interrupted, root, seconds_to_end), Log(root / "heard"))
    except KeyboardInterrupt:
        (root / "ended").write_text("KeyboardInterrupt")
        sys.exit(130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
