"""How long runs may still take, several of them at once.

The wall clock is dealt out among the runs that are open: of n open runs each is charged an n-th of every second. What a
run is charged in all is then what one more run costs the sweep, alone or in company, and what is left is a sum over
runs. That sum cannot be spent faster than the longest run goes: so the longer of the two is told, the sum, or the time
to the end of a single run at its present pace.
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

    @property
    def share_of_phase(self) -> float | None:
        """Seconds of its own share that the phase takes from its first step to its last."""
        return self.charged_in_phase / self.done * (self.done + self.left) if self.done > 0 else None


def sweep_seconds_left(completed: Sequence[float], paces: Iterable[Pace], *, waiting: int) -> float | None:
    """Seconds to the end of a sweep, None while no run of it has completed.

    completed: what each completed run was charged. Waiting runs take the median of these; an open one what is left of
    the median, or what its steps say, whichever is more.
    """
    if not completed:
        return None
    median = statistics.median(completed)
    known = list(paces)
    shares = [max(median - pace.charged, pace.share_left or 0.0, 0.0) for pace in known]
    return max(waiting * median + math.fsum(shares), *(pace.clock_left for pace in known), 0.0)


def training_seconds_left(paces: Sequence[Pace], *, waiting: int) -> float | None:
    """Seconds until these runs, and as many waiting ones of their mean length, are trained; None before any step."""
    totals = [pace.share_of_phase for pace in paces]
    known = [total for total in totals if total is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    shares = [mean if pace.share_left is None else pace.share_left for pace in paces]
    return max(waiting * mean + math.fsum(shares), *(pace.clock_left for pace in paces))
