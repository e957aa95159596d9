"""A sweep as a process of its own that is killed at chosen moments of its life and begun again until it ends by itself.

A moment is met by looking at the files of the ledger, as a user would: so the loop knows nothing of how runs are
carried out, one after another or together. Kills go to the whole process group: workers die with their parent.
"""

from __future__ import annotations

import contextlib
import enum
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lab.record.atomic import TEMPORARY_SUFFIX
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import ADAPTER_FOLDER, CHANGED_FOLDER, MODEL_FOLDER, RunRecord
from tests.journey.program import Answer, lines_of, process_environment

SAVED_FOLDERS = (ADAPTER_FOLDER, MODEL_FOLDER, CHANGED_FOLDER)
_LOOK_SECONDS = 0.001
_LIFE_SECONDS = 300.0


class Moment(enum.StrEnum):
    """Of a sweep's life, in the order in which a run meets them."""

    START = "start"  # until the first run is claimed
    TRAINING = "training"  # some steps after the start
    CHECKPOINT = "checkpoint"  # while what a run is resumed from is written; comes only where checkpoints are
    SAVING = "saving"  # while trained weights are written
    SCORING = "scoring"  # weights are there, the result is not
    RECORDING = "recording"  # a result has just been written


@dataclass(frozen=True)
class SweepFolder:
    """A folder with `sweeps/NAME.yaml`, its ledger, and what is said on every call beside the study's name."""

    path: Path
    cache: Path
    study: str
    overrides: tuple[str, ...]

    @property
    def root(self) -> Path:
        """The ledger's root."""
        return self.path / "lab"

    @property
    def command(self) -> list[str]:
        """What follows `lora-lab`; the same on every call."""
        places = [f"root='{self.root}'", f"cache='{self.cache}'", "tracking=off"]
        return ["run", "-m", f"study={self.study}", "--json", *self.overrides, *places]

    def write_study(self, text: str) -> None:
        """Puts the study in its place."""
        (self.path / "sweeps").mkdir(parents=True, exist_ok=True)
        (self.path / "sweeps" / f"{self.study}.yaml").write_text(text)

    def runs(self) -> list[RunRecord]:
        """Every run of the ledger."""
        return Ledger(self.root).runs()


class Life:
    """One process carrying out the sweep, alone in its process group. Its output goes to files, so it never waits."""

    def __init__(self, folder: SweepFolder, name: str) -> None:
        self._files = [folder.path / f"{name}.{stream}" for stream in ("out", "err")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lora_lab.app.cli", *folder.command],
                cwd=folder.path,
                env=process_environment(),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has lived."""
        return time.monotonic() - self.began

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself, or was killed."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def answer(self, *, seconds: float = _LIFE_SECONDS) -> Answer:
        """What it said, once it has ended by itself."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still at it after {seconds} s: {self._files[1].read_text()}") from None
        return Answer(code, *(file.read_text() for file in self._files))


@contextlib.contextmanager
def living(folder: SweepFolder, name: str) -> Iterator[Life]:
    """A process that does not outlive the block."""
    life = Life(folder, name)
    try:
        yield life
    finally:
        life.kill()


@dataclass(frozen=True)
class Kill:
    """A kill that met its moment: when, and in which states it left the unfinished runs (`state_of`)."""

    moment: Moment
    seconds: float
    left: tuple[str, ...]


def kill_once(folder: SweepFolder, moment: Moment, draw: random.Random, name: str) -> Kill | Answer:
    """Starts the sweep and kills it at `moment`; the answer where it ended by itself before."""
    before = _finished(folder.root)
    with living(folder, name) as life:
        is_met = _condition(folder.root, moment, draw, before)
        while not is_met(life.seconds):
            if life.has_ended:
                return life.answer()
            assert life.seconds < _LIFE_SECONDS, f"{moment}: waited in vain"
            time.sleep(_LOOK_SECONDS)
        time.sleep(_DELAYS[moment] * draw.random() ** 2)
        if life.has_ended:
            return life.answer()
        seconds = life.seconds
        life.kill()
    return Kill(moment, seconds, tuple(state_of(run) for run in _folders(folder.root) if not _has_result(run)))


def state_of(run: Path) -> str:
    """How far an unfinished run has come: claimed, training, saving or scoring."""
    if _saved(run):
        return "scoring"
    if _is_writing(run, SAVED_FOLDERS):
        return "saving"
    return "training" if lines_of(run / "steps.jsonl") else "claimed"


# Seconds after the first sign of a moment within which the kill falls, sooner rather than later.
_DELAYS = {
    Moment.START: 0.3,
    Moment.TRAINING: 0.02,
    Moment.CHECKPOINT: 0.004,
    Moment.SAVING: 0.004,
    Moment.SCORING: 0.06,
    Moment.RECORDING: 0.03,
}
_START_SECONDS = 6.0
_MOST_STEPS = 25
_MOST_SIGNS = 3


def _condition(root: Path, moment: Moment, draw: random.Random, before: set[str]) -> Callable[[float], bool]:
    """Whether the moment has come, asked again and again with the seconds since the start.

    Of moments that come once per run one of the first few is drawn, so that some runs are finished in between.
    """
    if moment is Moment.START:
        latest = draw.uniform(0, _START_SECONDS)
        had = len(_folders(root))
        return lambda seconds: seconds >= latest or len(_folders(root)) > had
    signs: dict[Moment, Callable[[], set[str]]] = {
        Moment.CHECKPOINT: lambda: _unfinished(root, _is_checkpointing),
        Moment.SAVING: lambda: _unfinished(root, lambda run: _is_writing(run, SAVED_FOLDERS)),
        Moment.SCORING: lambda: _unfinished(root, _saved),
        Moment.RECORDING: lambda: _finished(root) - before,
    }
    if moment is Moment.TRAINING:
        counter, wanted = _StepCounter(root), draw.randint(1, _MOST_STEPS)
        return lambda _: counter.count() >= wanted
    seen: set[str] = set()
    left_over = set() if moment is Moment.RECORDING else signs[moment]()
    wanted = draw.randint(1, _MOST_SIGNS)

    def is_met(_: float) -> bool:
        # What an earlier life left behind is no sign, until the run has been begun again and the sign is gone.
        now = signs[moment]()
        left_over.intersection_update(now)
        seen.update(now - left_over)
        return len(seen) >= wanted

    return is_met


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in (root / "runs").iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []


def _has_result(run: Path) -> bool:
    return (run / "result.json").exists()


def _finished(root: Path) -> set[str]:
    return {run.name for run in _folders(root) if _has_result(run)}


def _unfinished(root: Path, is_so: Callable[[Path], bool]) -> set[str]:
    return {run.name for run in _folders(root) if not _has_result(run) and is_so(run)}


def _saved(run: Path) -> bool:
    return any((run / name).is_dir() for name in SAVED_FOLDERS)


def _is_writing(run: Path, names: Sequence[str]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(
            entry.suffix == TEMPORARY_SUFFIX and entry.name.startswith(tuple(f".{name}." for name in names))
            for entry in run.iterdir()
        )
    return False


def _is_checkpointing(run: Path) -> bool:
    """Whether there is more or less in the run's checkpoint than one file of tensors and the manifest that names it."""
    with contextlib.suppress(FileNotFoundError):
        names = [entry.name for entry in (run / "checkpoint").iterdir()]
        return bool(names) and (len(names) != 2 or "checkpoint.json" not in names)
    return False


class _StepCounter:
    """Counts lines that are added to step logs from now on; a log that was put aside counts from its new beginning."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last = self._lines()
        self._total = 0

    def _lines(self) -> dict[str, int]:
        return {run.name: lines_of(run / "steps.jsonl") for run in _folders(self._root)}

    def count(self) -> int:
        """How many there were so far."""
        now = self._lines()
        for name, lines in now.items():
            before = self._last.get(name, 0)
            self._total += lines - before if lines >= before else lines
        self._last = now
        return self._total
