"""How long runs may still take, several of them at once.

The wall clock is dealt out among the runs that are open: of n open runs each is charged an n-th of every second. What a
run is charged in all is then what one more run costs the sweep, alone or in company, and what is left is a sum.

Near the end that sum is too little: it takes the machine to go as much faster for each run as fewer are left, while the
longest of them may not go faster at all. Where its time by the clock at the present pace is more than the sum, the
middle of both is told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """An open run. charged: seconds of its own share so far, from its beginning, and `charged_in_phase` of these since
    its present phase began; `phase_seconds` by the clock. `done`: steps in that phase; `left`: steps still to do."""

    charged: float
    charged_in_phase: float
    phase_seconds: float
    done: int
    left: int

    @property
    def share_left(self) -> float | None:
        """Seconds of its own share that its steps will still take; None before the first, and without steps."""
        return self.charged_in_phase / self.done * self.left if self.done > 0 else None

    @property
    def clock_left(self) -> float:
        """Seconds by the clock to its last step at the present pace; 0 where there is none to tell."""
        return self.phase_seconds / self.done * self.left if self.done > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """A completed run: what it was charged, and how many steps it had."""

    charged: float
    steps: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Runs that have not begun. steps: how many steps they have in all; None where that is not known."""

    runs: int
    steps: int | None


def sweep_seconds_left(completed: Sequence[Done], paces: Sequence[Pace], waiting: Waiting) -> float | None:
    """Seconds to the end of a sweep, None while no run of it has completed.

    An open run takes what is left of the median of the completed ones, or what its steps say, whichever is more.
    Waiting ones take that median each, or as much for each step as the completed ones took where their steps are known.
    """
    if not completed:
        return None
    median = statistics.median(one.charged for one in completed)
    steps = sum(one.steps for one in completed)
    if waiting.steps is None or not steps:
        rest = waiting.runs * median
    else:
        rest = waiting.steps * math.fsum(one.charged for one in completed if one.steps) / steps
    shares = [max(median - pace.charged, pace.share_left or 0.0, 0.0) for pace in paces]
    return _between(rest + math.fsum(shares), paces)


def training_seconds_left(paces: Sequence[Pace], waiting: Waiting) -> float | None:
    """Seconds until these runs and the waiting ones are trained; None before any step. Waiting ones are taken to go as
    fast, and to be as long, on the average, where their steps are not known."""
    going = [pace for pace in paces if pace.done > 0]
    if not going:
        return None
    per_step = math.fsum(pace.charged_in_phase for pace in going) / sum(pace.done for pace in going)
    mean = statistics.fmean(pace.done + pace.left for pace in going)
    steps = waiting.runs * mean if waiting.steps is None else waiting.steps
    shares = [per_step * pace.left if pace.share_left is None else pace.share_left for pace in paces]
    return _between(per_step * steps + math.fsum(shares), paces)


def _between(total: float, paces: Iterable[Pace]) -> float:
    longest = max((pace.clock_left for pace in paces), default=0.0)
    return (total + longest) / 2 if longest > total else total
