"""Runs and cohorts that are open: what was last told of each, how fast it goes, when a reader last heard of it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import CohortView, StepValues
from lora_lab.report.sweep_view import RunView
from lora_lab.report.time_left import Pace

# Speed is told over the last steps: one step's own time jumps with the length of its rows.
_SPEED_STEPS = 10
_AFTER_TRAINING = ("saving", "scoring")  # also of a run that ended early
_MEMORY_KEYS = ("allocated_bytes", "rss_bytes")


@dataclass(slots=True)
class OpenRun:
    """A run that has begun and not ended. Seconds are of the sweep's clock.

    charged: its share of the clock so far (see `time_left`). Of its present phase: since when, what was charged before,
    and how many steps were done before. told_at, told_step: when a reader of plain lines last heard of it, and at which
    step.
    """

    header: RunHeader
    steps: int
    started: float
    phase_since: float
    told_at: float
    told_step: int = 0
    charged: float = 0.0
    phase: str = ""
    phase_charged: float = 0.0
    phase_step: int = 0
    step: int = 0
    loss: float | None = None
    memory: tuple[str, float] | None = None
    cohort: str | None = None
    speeds: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SPEED_STEPS))

    def enter(self, phase: str, now: float) -> None:
        """A phase begins, or says how far it is (after a colon)."""
        if phase.partition(":")[0] != self.phase.partition(":")[0]:
            self.phase_since, self.phase_charged, self.phase_step = now, self.charged, self.step
        self.phase = phase

    def take(self, step: int, loss: float | None) -> None:
        """A step is done. The first of another attempt may be one in the middle, since a checkpoint held the others."""
        if self.step == 0 and self.header.attempt > 1:
            self.phase_step = max(step - 1, 0)
        self.step, self.loss = step, loss

    def measure(self, values: StepValues) -> None:
        """Speed and memory of a step, as far as its values tell them; `values` as in the step log."""
        tokens, seconds = values.get("tokens"), values.get("seconds")
        if tokens is not None and seconds is not None:
            self.speeds.append((tokens, seconds))
        measured = ((key, values.get(key)) for key in _MEMORY_KEYS)
        self.memory = next(((key, value) for key, value in measured if value is not None), self.memory)

    def pace(self, now: float, uncharged: float) -> Pace:
        """How fast it goes. uncharged: its share of the clock since that was last dealt out."""
        charged = self.charged + uncharged
        return Pace(
            charged=charged,
            charged_in_phase=charged - self.phase_charged,
            phase_seconds=now - self.phase_since,
            done=self.step - self.phase_step,
            left=0 if self.phase.startswith(_AFTER_TRAINING) else max(self.steps - self.step, 0),
        )

    def view(self, now: float, *, state: str | None = None, reason: str | None = None) -> RunView:
        """The run now; `state` is its status, and `reason` why, where it has just ended."""
        is_member = self.cohort is not None
        seconds = 0.0 if is_member else math.fsum(seconds for _, seconds in self.speeds)
        memory = None if is_member else self.memory
        return RunView(
            name=self.header.name,
            state=self.phase if state is None else state,
            is_open=state is None,
            step=self.step,
            steps=self.steps,
            loss=self.loss,
            tokens_per_second=math.fsum(tokens for tokens, _ in self.speeds) / seconds if seconds else None,
            memory_key=memory[0] if memory else None,
            memory_bytes=memory[1] if memory else None,
            seconds=now - self.started,
            reason=reason,
            cohort=self.cohort,
        )


@dataclass(slots=True)
class OpenCohort:
    """A cohort. `step`: how many steps all its runs have done since it was first told of; `steps`: the last known one
    of each. told_at, told_step: as of a run."""

    view: CohortView
    told_at: float
    told_step: int = 0
    step: int = 0
    steps: dict[str, int] = field(default_factory=dict)

    def take(self, view: CohortView) -> None:
        """What it is at now."""
        self.view = view
        for member in view.members:
            self.step += max(member.step - self.steps.get(member.run_id, member.step), 0)
            self.steps[member.run_id] = member.step
