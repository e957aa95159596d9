"""Draws the page again whenever a run has ended, as long as that costs little beside the runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_lab.errors import LabError
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import CohortView, StepValues

# Of the time since the last drawing, drawing may take this share; a page of a thousand runs is drawn less often.
_SHARE = 0.05


class Redraw:
    """A watcher. `draw` draws the page; what it cannot do is said once, and the sweep goes on."""

    def __init__(self, draw: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._draw = draw
        self._clock = clock
        self._ended = -float("inf")
        self._cost_seconds = 0.0
        self._is_silent = False

    def begin(self, total_runs: int) -> None:
        """The page is there from the start, so that it can be opened while the first run goes on."""
        if total_runs:  # else it is drawn at the end, which is now
            self.now()

    def run_started(self, header: RunHeader, folder: Path, *, steps: int) -> None:
        """Nothing new to show."""

    def phase(self, run_id: str, text: str) -> None:
        """Nothing new to show."""

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """Nothing new to show."""

    def cohort(self, cohort_id: str, view: CohortView) -> None:
        """Nothing new to show."""

    def run_finished(self, header: RunHeader, folder: Path, result: Result) -> None:
        """Draws, unless the last drawing took too much of the time since."""
        if self._cost_seconds <= _SHARE * (self._clock() - self._ended):
            self.now()

    def now(self) -> None:
        """Draws."""
        start = self._clock()
        try:
            self._draw()
        except LabError as error:
            if not self._is_silent:
                print(f"the page is not drawn: {error}", file=sys.stderr)
            self._is_silent = True
        self._ended = self._clock()
        self._cost_seconds = self._ended - start
