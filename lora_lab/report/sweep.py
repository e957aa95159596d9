"""What the runs of a sweep are at: which are open, how the last ones ended, how many wait, how long it may still take.

Numbers only; `progress` tells them in lines and `live` as a table. The training thread writes, a display's thread reads
whole views.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import CohortView, StepValues
from lora_lab.report.open_runs import OpenCohort, OpenRun
from lora_lab.report.sweep_view import CohortState, RunView, SweepView
from lora_lab.report.time_left import Done, Pace, Waiting, sweep_seconds_left, training_seconds_left

__all__ = ["CohortState", "RunView", "Sweep", "SweepView"]

_KEPT_ENDED = 5
_KEPT_FAILURES = 2
# What a search stops early is no failure, and says how long a run of it takes.
_AS_PLANNED = (Status.COMPLETED, Status.STOPPED)


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
            self._open: dict[str, OpenRun] = {}
            self._cohorts: dict[str, OpenCohort] = {}
            self._ended: dict[str, RunView] = {}
            self._failures: dict[str, RunView] = {}
            self._outcomes: dict[str, str] = {}
            self._numbers: dict[str, int] = {}
            self._completed: list[Done] = []

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
            self._open[run_id] = OpenRun(header, steps, started=now, phase_since=now, told_at=now)
            return self._numbers.setdefault(run_id, len(self._numbers) + 1)

    def phase(self, run_id: str, text: str) -> None:
        """The run enters a phase."""
        with self._lock:
            if (run := self._open.get(run_id)) is not None:
                run.enter(text, self._charge())

    def step(self, run_id: str, step: int, values: StepValues) -> None:
        """An optimizer step is done; `values` as in the step log."""
        with self._lock:
            if (run := self._open.get(run_id)) is None:
                return
            run.take(step, values.get("loss"))
            run.measure(values)

    def cohort(self, cohort_id: str, view: CohortView) -> None:
        """What a cohort is at; its members are open runs."""
        with self._lock:
            now = self._charge()
            self._cohorts.setdefault(cohort_id, OpenCohort(view, told_at=now)).take(view)
            for member in view.members:
                if (run := self._open.get(member.run_id)) is not None:
                    run.cohort = cohort_id
                    run.take(member.step, member.loss)

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
                self._completed.append(Done(run.charged, run.steps))
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
            if (run := self._open.get(run_id)) is None or run.cohort is not None:
                return False
            share = (run.step - run.told_step) / run.steps if run.steps else 0.0
            return self._is_due(run, share >= after_share, after_seconds, silence_seconds)

    def is_cohort_line_due(
        self, cohort_id: str, *, after_seconds: float, after_share: float, silence_seconds: float
    ) -> bool:
        """The same for a cohort, by the steps of all its runs together."""
        with self._lock:
            cohort = self._cohorts[cohort_id]
            if cohort_id not in self._live():
                return False
            steps = sum(member.steps for member in cohort.view.members)
            share = (cohort.step - cohort.told_step) / steps if steps else 0.0
            return self._is_due(cohort, share >= after_share, after_seconds, silence_seconds)

    def _is_due(self, one: OpenRun | OpenCohort, has_moved: bool, after_seconds: float, silence_seconds: float) -> bool:
        now = self._clock()
        alone = [run for run in self._open.values() if run.cohort is None]
        others: list[OpenRun | OpenCohort] = [*alone, *(self._cohorts[name] for name in self._live())]
        silence = now - max(other.told_at for other in (one, *self._open.values(), *others))
        if not ((silence >= after_seconds and has_moved) or silence >= silence_seconds):
            return False
        if any(other.told_at < one.told_at and other.step > other.told_step for other in others):
            return False
        one.told_at, one.told_step = now, one.step
        return True

    def _live(self) -> list[str]:
        """Cohorts that have an open run, in the order in which they began."""
        present = {run.cohort for run in self._open.values()}
        return [name for name in self._cohorts if name in present]

    def run_view(self, run_id: str) -> RunView:
        """An open run now; raises KeyError for any other."""
        with self._lock:
            return self._open[run_id].view(self._clock())

    def cohort_state(self, cohort_id: str) -> CohortState:
        """A cohort now; raises KeyError for one that was never told of."""
        with self._lock:
            return self._cohort_state(cohort_id, self._clock())

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
                cohorts=tuple(self._cohort_state(name, now) for name in self._live()),
            )

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the sweep (`time_left`), or None while no run has ended as planned."""
        with self._lock:
            return self._seconds_left(self._clock())

    def _seconds_left(self, now: float) -> float | None:
        views = [self._cohorts[name].view for name in self._live()]
        runs, steps = sum(view.waiting for view in views), [view.waiting_steps for view in views]
        known = [one for one in steps if one is not None]
        is_known = runs == self._waiting() and len(known) == len(steps)
        waiting = Waiting(self._waiting(), sum(known) if is_known else None)
        return sweep_seconds_left(self._completed, self._paces(self._open.values(), now), waiting)

    def _paces(self, runs: Iterable[OpenRun], now: float) -> list[Pace]:
        uncharged = (now - self._charged) / max(len(self._open), 1)
        return [run.pace(now, uncharged) for run in runs]

    def _cohort_state(self, cohort_id: str, now: float) -> CohortState:
        view = self._cohorts[cohort_id].view
        seats = {member.run_id: place for place, member in enumerate(view.members)}
        mine = [(run_id, run) for run_id, run in self._open.items() if run.cohort == cohort_id]
        mine.sort(key=lambda pair: seats.get(pair[0], len(seats)))
        seated = [run for run_id, run in mine if run_id in seats]
        shares = [run.step / run.steps for run in seated if run.steps]
        return CohortState(
            id=cohort_id,
            seats=view.seats,
            seated=len(view.members),
            waiting=view.waiting,
            members=tuple(run.view(now) for _, run in mine),
            shares=(min(shares), max(shares)) if shares else None,
            tokens_per_second=view.tokens_per_second,
            memory_key=view.memory_key,
            memory_bytes=view.memory_bytes,
            training_seconds_left=training_seconds_left(
                self._paces(seated, now), Waiting(view.waiting, view.waiting_steps)
            ),
        )

    def _waiting(self) -> int:
        return max(self._total - len(self._outcomes) - len(self._open), 0)

    def _charge(self) -> float:
        """Deals out the time since the last charge among the open runs; returns the present."""
        now = self._clock()
        for run in self._open.values():
            run.charged += (now - self._charged) / len(self._open)
        self._charged = now
        return now
