"""What the runs of a sweep are at: which are open, how the last ones ended, how many wait, how long it may still take.

Numbers only; `progress` tells them in lines and `live` as a table. The training thread writes, a display's thread reads
whole views.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import StepValues

# Speed is told over the last steps: one step's own time jumps with the length of its rows.
_SPEED_STEPS = 10
_KEPT_ENDED = 5
_KEPT_FAILURES = 2
_MEMORY_KEYS = ("allocated_bytes", "rss_bytes")
# What a search stops early is no failure, and says how long a run of it takes.
_AS_PLANNED = (Status.COMPLETED, Status.STOPPED)


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment. `state` is its phase, or its status once it has ended; `seconds` what it took so far.

    memory_bytes is of the last step, and memory_key (a key of the step log) says what it counts.
    """

    name: str
    state: str
    is_open: bool
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    memory_key: str | None
    memory_bytes: float | None
    seconds: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class SweepView:
    """A sweep at one moment. `ended` and `failures` hold the last few, oldest first; `outcomes` counts by status."""

    total: int
    waiting: int
    running: tuple[RunView, ...]
    ended: tuple[RunView, ...]
    failures: tuple[RunView, ...]
    outcomes: Mapping[str, int]
    elapsed_seconds: float
    seconds_left: float | None


@dataclass(slots=True)
class _Open:
    header: RunHeader
    steps: int
    started: float
    phase_since: float
    told_at: float
    told_step: int = 0
    part_seconds: float = 0.0
    phase: str = ""
    step: int = 0
    loss: float | None = None
    memory: tuple[str, float] | None = None
    pace: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SPEED_STEPS))

    def view(self, now: float, *, state: str | None = None, reason: str | None = None) -> RunView:
        seconds = math.fsum(seconds for _, seconds in self.pace)
        return RunView(
            name=self.header.name,
            state=self.phase if state is None else state,
            is_open=state is None,
            step=self.step,
            steps=self.steps,
            loss=self.loss,
            tokens_per_second=math.fsum(tokens for tokens, _ in self.pace) / seconds if seconds else None,
            memory_key=self.memory[0] if self.memory else None,
            memory_bytes=self.memory[1] if self.memory else None,
            seconds=now - self.started,
            reason=reason,
        )


class Sweep:
    """The state, by run id, so that several runs can be open at once. A run tried again counts once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.begin(0)

    def begin(self, total: int) -> None:
        """A sweep of that many runs begins; what was known of another is forgotten."""
        with self._lock:
            self._total = total
            self._begun = self._charged = self._clock()
            self._open: dict[str, _Open] = {}
            self._ended: dict[str, RunView] = {}
            self._failures: dict[str, RunView] = {}
            self._outcomes: dict[str, str] = {}
            self._numbers: dict[str, int] = {}
            self._run_seconds: list[float] = []

    @property
    def total(self) -> int:
        """How many runs the sweep has."""
        return self._total

    def start(self, header: RunHeader, steps: int) -> int:
        """An attempt begins; returns the run's number, from 1, in the order of first attempts."""
        with self._lock:
            now = self._charge()
            run_id = header.run_id
            self._outcomes.pop(run_id, None)
            self._ended.pop(run_id, None)
            self._failures.pop(run_id, None)
            self._open[run_id] = _Open(header, steps, started=now, phase_since=now, told_at=now)
            return self._numbers.setdefault(run_id, len(self._numbers) + 1)

    def phase(self, run_id: str, text: str) -> None:
        """The run enters a phase."""
        with self._lock:
            if (run := self._open.get(run_id)) is not None:
                if text.partition(":")[0] != run.phase.partition(":")[0]:
                    run.phase_since = self._clock()
                run.phase = text

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """An optimizer step is done; `values` as in the step log."""
        with self._lock:
            if (run := self._open.get(run_id)) is None:
                return
            run.step, run.loss = step, values.get("loss")
            tokens, seconds = values.get("tokens"), values.get("seconds")
            if tokens is not None and seconds is not None:
                run.pace.append((tokens, seconds))
            measured = ((key, values.get(key)) for key in _MEMORY_KEYS)
            run.memory = next(((key, value) for key, value in measured if value is not None), run.memory)

    def finish(self, header: RunHeader, result: Result) -> tuple[RunView | None, int]:
        """The attempt ended: its last view (None where its start was not told) and how many runs have ended by now."""
        with self._lock:
            now = self._charge()
            run_id, status = header.run_id, str(result.status)
            self._outcomes[run_id] = status
            run = self._open.pop(run_id, None)
            if run is None:
                return None, len(self._outcomes)
            if result.status in _AS_PLANNED:
                self._run_seconds.append(run.part_seconds)
            view = run.view(now, state=status, reason=result.reason)
            self._ended[run_id] = view
            if result.status not in _AS_PLANNED:
                self._failures[run_id] = view
            for kept, most in ((self._ended, _KEPT_ENDED), (self._failures, _KEPT_FAILURES)):
                for old in list(kept)[:-most]:
                    del kept[old]
            return view, len(self._outcomes)

    def is_line_due(self, run_id: str, *, after_seconds: float, after_share: float, silence_seconds: float) -> bool:
        """Whether a reader of plain lines should hear of this run now; if so it counts as told.

        A line is due `after_seconds` without one if the run has done `after_share` of its steps since it was last told
        of, and after `silence_seconds` in any case. Of several open runs the one untold for longest has its turn.
        """
        with self._lock:
            if (run := self._open.get(run_id)) is None:
                return False
            now = self._clock()
            silence = now - max(other.told_at for other in self._open.values())
            share = (run.step - run.told_step) / run.steps if run.steps else 0.0
            if not ((silence >= after_seconds and share >= after_share) or silence >= silence_seconds):
                return False
            if any(other.told_at < run.told_at and other.step > other.told_step for other in self._open.values()):
                return False
            run.told_at, run.told_step = now, run.step
            return True

    def run_view(self, run_id: str) -> RunView:
        """An open run now; raises KeyError for any other."""
        with self._lock:
            return self._open[run_id].view(self._clock())

    def view(self) -> SweepView:
        """All of it now."""
        with self._lock:
            now = self._clock()
            return SweepView(
                total=self._total,
                waiting=self._waiting(),
                running=tuple(run.view(now) for run in self._open.values()),
                ended=tuple(self._ended.values()),
                failures=tuple(self._failures.values()),
                outcomes=Counter(self._outcomes.values()),
                elapsed_seconds=now - self._begun,
                seconds_left=self._seconds_left(now),
            )

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the sweep, or None while no run of it has completed or was stopped early.

        Runs not begun take the median of those. An open run takes what is left of that median, or what its
        own steps so far say about the steps still to do, whichever is longer. Of runs that are open together each is
        charged its part of the wall clock, so the median is what one more run costs, alone or in company.
        """
        with self._lock:
            return self._seconds_left(self._clock())

    def _seconds_left(self, now: float) -> float | None:
        if not self._run_seconds:
            return None
        median = statistics.median(self._run_seconds)
        uncharged = (now - self._charged) / max(len(self._open), 1)
        by_median = math.fsum(max(median - run.part_seconds - uncharged, 0.0) for run in self._open.values())
        by_steps = (
            (now - run.phase_since) / run.step * (run.steps - run.step)
            for run in self._open.values()
            if 0 < run.step < run.steps
        )
        return self._waiting() * median + max(by_median, *by_steps, 0.0)

    def _waiting(self) -> int:
        return max(self._total - len(self._outcomes) - len(self._open), 0)

    def _charge(self) -> float:
        """Deals out the time since the last charge among the open runs; returns the present."""
        now = self._clock()
        for run in self._open.values():
            run.part_seconds += (now - self._charged) / len(self._open)
        self._charged = now
        return now
