"""What a display shows of a sweep at one moment: its runs, its cohorts, and the whole. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment. `state` is its phase, or its status once it has ended; `seconds` what it took so far.

    memory_bytes is of the last step, and memory_key (a key of the step log) says what it counts. cohort: the id of that
    in which it is trained; speed and memory are the cohort's then, and None here.
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
    cohort: str | None = None


@dataclass(frozen=True, slots=True)
class CohortState:
    """A cohort at one moment. `members`: its open runs, those that have a seat (`seated`) first.

    shares: of their steps, what the seated runs with steps have done, least and most; None where there is none.
    training_seconds_left: until its present and waiting runs are trained (not scored), None while it is not known.
    """

    id: str
    seats: int
    seated: int
    waiting: int
    members: tuple[RunView, ...]
    shares: tuple[float, float] | None
    tokens_per_second: float | None
    memory_key: str | None
    memory_bytes: float | None
    training_seconds_left: float | None


@dataclass(frozen=True, slots=True)
class SweepView:
    """A sweep at one moment. `running`: all open runs, members of cohorts included and together. `ended` and `failures`
    hold the last few, oldest first; `outcomes` counts by status."""

    total: int
    waiting: int
    running: tuple[RunView, ...]
    ended: tuple[RunView, ...]
    failures: tuple[RunView, ...]
    outcomes: Mapping[str, int]
    elapsed_seconds: float
    seconds_left: float | None
    cohorts: tuple[CohortState, ...] = ()
