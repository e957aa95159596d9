"""Progress of a sweep on stderr: a live table in a terminal, a few plain lines in a pipe.

stdout stays free for the table of results. The time left is told only when a run of this sweep has ended and says how
long one takes (`sweep.Sweep.seconds_left`); until then it is unknown. Of a cohort it is known earlier how long the
training of its runs will still take.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console

from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import CohortView, StepValues
from lora_lab.report.grid import console_for, print_line
from lora_lab.report.live import LiveTable, cohort_parts, first_line, left_text
from lora_lab.report.sweep import RunView, Sweep
from lora_lab.report.text import bytes_text, clean, number_text, seconds_text

_LINE_SECONDS = 10.0
_LINE_SHARE = 0.1
_LONGEST_SILENCE_SECONDS = 60.0
_LINES = {"after_seconds": _LINE_SECONDS, "after_share": _LINE_SHARE, "silence_seconds": _LONGEST_SILENCE_SECONDS}


class Progress:
    """A watcher. Use as a context manager; every method is cheap, and none minds that nobody reads any more."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console: Console = console_for(sys.stderr if stream is None else stream)
        # What a library prints there would else run into the table. A pipe on stdout is left alone.
        self._redirects_stdout = stream is None and sys.stdout.isatty()
        self._sweep = Sweep(clock)
        self._live: LiveTable | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = LiveTable(self._console, self._sweep.view, redirect_stdout=self._redirects_stdout)
            with contextlib.suppress(OSError):
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError):
                live.stop()

    def begin(self, total_runs: int) -> None:
        """A sweep of that many runs begins; those already done are not among them."""
        self._sweep.begin(total_runs)
        if self._live is None or not total_runs:
            self._say(f"{total_runs} runs to do" if total_runs else "nothing to run")

    def run_started(self, header: RunHeader, folder: Path, *, steps: int) -> None:
        """A run begins; `steps` is 0 where nothing is trained or the number is not known."""
        number = self._sweep.start(header, steps)
        if self._live is None:
            told = f", {steps} steps" if steps else ""
            self._say(f"[{number}/{self._sweep.total}] {header.name} started{told}; time left: {self._left()}")

    def phase(self, run_id: str, text: str) -> None:
        """The run enters a phase: loading, training, scoring."""
        self._sweep.phase(run_id, text)

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """An optimizer step is done."""
        self._sweep.step(run_id, step, values)
        if self._live is None and self._sweep.is_line_due(run_id, **_LINES):
            run = self._sweep.run_view(run_id)
            self._say(f"  {clean(run.name)}: {_step_text(run)}; time left: {self._left()}")

    def cohort(self, cohort_id: str, view: CohortView) -> None:
        """What a cohort is at. In a pipe its lines stand in for those of its runs."""
        self._sweep.cohort(cohort_id, view)
        if self._live is None and self._sweep.is_cohort_line_due(cohort_id, **_LINES):
            state = self._sweep.cohort_state(cohort_id)
            self._say(f"  {clean(', '.join(cohort_parts(state)))}; time left: {self._left()}")

    def run_finished(self, header: RunHeader, folder: Path, result: Result) -> None:
        """The run ended. The whole of a long reason is in its result."""
        run, ended = self._sweep.finish(header, result)
        took = _took(run)
        reason = first_line(result.reason)
        told = f"[{ended}/{self._sweep.total}] {header.name} {result.status}{took}"
        self._say(told + (f": {reason}" if reason else ""))

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the sweep, or None while nothing is known: see `Sweep.seconds_left`."""
        return self._sweep.seconds_left()

    def _left(self) -> str:
        left = self.seconds_left()
        return "unknown" if left is None else left_text(left)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # who read along has left, or the disk is full; the sweep goes on
            print_line(self._console, text)


def _took(run: RunView | None) -> str:
    """In a cohort the time is not the run's own."""
    if run is None:
        return ""
    if run.cohort is None:
        return f" in {seconds_text(run.seconds)}"
    return f" after {seconds_text(run.seconds)} with others in cohort {run.cohort}"


def _step_text(run: RunView) -> str:
    parts = [f"step {run.step}" + (f"/{run.steps}" if run.steps else "")]
    if run.loss is not None:
        parts.append(f"loss {number_text(run.loss)}")
    if run.tokens_per_second is not None:
        parts.append(f"{run.tokens_per_second:,.0f} tokens/s")
    if run.memory_bytes is not None:
        parts.append(bytes_text(run.memory_bytes))
    return ", ".join(parts)
