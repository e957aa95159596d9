"""Progress of a sweep on stderr: a live display in a terminal, a few plain lines in a pipe.

stdout stays free for the table. The time left is told only when a run of this sweep has ended and says how long one
takes; until then it is unknown.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import StepValues
from lora_lab.report.grid import console_for, print_line
from lora_lab.report.text import bytes_text, clean, number_text, seconds_text

_LINE_SECONDS = 10.0
_LINE_SHARE = 0.1
_LONGEST_SILENCE_SECONDS = 60.0
_FRAMES_PER_SECOND = 2


class Progress:
    """Told by the runner what happens. Use as a context manager; every method is cheap."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console: Console = console_for(sys.stderr if stream is None else stream)
        self._clock = clock
        self._live: Live | None = None
        self._total = 0
        self._outcomes: dict[int, str] = {}  # by index of the run, so that one tried again counts once
        self._run_seconds: list[float] = []
        self._order: dict[str, int] = {}
        self._forget_run()

    def _forget_run(self) -> None:
        self._name: str | None = None
        self._index = -1
        self._phase = ""
        self._steps = self._step = 0
        self._loss: float | None = None
        self._speed: float | None = None
        self._memory_bytes: float | None = None
        self._started = self._line_at = self._training_since = self._clock()
        self._line_step = 0

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._display,
                refresh_per_second=_FRAMES_PER_SECOND,
                redirect_stdout=False,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, total_runs: int) -> None:
        """A sweep of that many runs begins; those already done are not among them."""
        self._total = total_runs
        self._outcomes.clear()
        self._run_seconds.clear()
        self._say(f"{total_runs} runs to do" if total_runs else "nothing to run")

    def run_started(self, header: RunHeader, folder: Path, *, steps: int) -> None:
        """A run begins; `steps` is 0 where nothing is trained or the number is not known."""
        name = header.name
        index = self._order.setdefault(header.run_id, len(self._order))
        self._forget_run()
        self._index, self._name, self._steps = index, name, steps
        told = f", {steps} steps" if steps else ""
        self._say(f"[{index + 1}/{self._total}] {name} started{told}; time left: {self._left_text()}")

    def phase(self, run_id: str, text: str) -> None:
        """The run enters a phase: loading, training, scoring."""
        self._phase = text
        self._training_since = self._clock()

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """An optimizer step is done."""
        self._step, self._loss = step, values["loss"]
        self._speed = (values["tokens"] or 0) / (values["seconds"] or math.inf)
        self._memory_bytes = values.get("allocated_bytes", values.get("rss_bytes"))
        if self._live is None and self._is_line_due():
            self._line_at, self._line_step = self._clock(), step
            self._say(f"  {clean(self._name or '')}: {self._step_text()}; time left: {self._left_text()}")

    def run_finished(self, header: RunHeader, folder: Path, result: Result) -> None:
        """The run ended."""
        name, status, text = header.name, result.status, result.reason
        seconds = self._clock() - self._started
        if self._name is not None and str(status) == Status.COMPLETED:
            self._run_seconds.append(seconds)
        took = f" in {seconds_text(seconds)}" if self._name is not None else ""
        self._outcomes[self._index if self._name is not None else -1 - len(self._outcomes)] = str(status)
        self._say(f"[{len(self._outcomes)}/{self._total}] {name} {status}{took}" + (f": {text}" if text else ""))
        self._forget_run()

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the sweep, or None while nothing is known.

        Runs not begun take the median of the completed ones. The present run takes what is left of that median, or what
        its own steps so far say about the steps still to do, whichever is longer.
        """
        if not self._run_seconds:
            return None
        median = statistics.median(self._run_seconds)
        is_new = self._name is not None and self._index not in self._outcomes
        waiting = max(self._total - len(self._outcomes) - is_new, 0)
        if self._name is None:
            return waiting * median
        now = self._clock()
        present = max(median - (now - self._started), 0.0)
        if 0 < self._step < self._steps:
            present = max(present, (now - self._training_since) / self._step * (self._steps - self._step))
        return waiting * median + present

    def _is_line_due(self) -> bool:
        silence = self._clock() - self._line_at
        share = (self._step - self._line_step) / self._steps if self._steps else 0.0
        return (silence >= _LINE_SECONDS and share >= _LINE_SHARE) or silence >= _LONGEST_SILENCE_SECONDS

    def _step_text(self) -> str:
        parts = [f"step {self._step}" + (f"/{self._steps}" if self._steps else "")]
        if self._loss is not None:
            parts.append(f"loss {number_text(self._loss)}")
        if self._speed is not None:
            parts.append(f"{self._speed:,.0f} tokens/s")
        if self._memory_bytes is not None:
            parts.append(bytes_text(self._memory_bytes))
        return ", ".join(parts)

    def _left_text(self) -> str:
        left = self.seconds_left()
        if left is None:
            return "unknown"
        return f"about {left:.0f} s" if left < 59.5 else f"about {seconds_text(left)}"

    def _say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # who read along has left; the sweep goes on
            print_line(self._console, text)

    def _display(self) -> Group:
        """The live part: the sweep on one line, the present run on the next."""
        ended = ", ".join(f"{count} {status}" for status, count in Counter(self._outcomes.values()).items())
        remaining = self._total - len(self._outcomes)
        sweep = f"{remaining} of {self._total} runs left" + (f" ({ended})" if ended else "")
        lines: list[Text | ProgressBar] = [Text(f"{sweep}; time left: {self._left_text()}", style="bold")]
        if self._name is not None:
            detail = self._step_text() if self._step else ""
            lines.append(Text(", ".join(part for part in (clean(self._name), self._phase, detail) if part)))
            if self._steps:
                lines.append(ProgressBar(total=self._steps, completed=self._step, width=40))
        return Group(*lines)
