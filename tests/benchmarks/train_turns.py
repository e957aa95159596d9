"""Turns: one side after another, round by round, so that a machine whose speed drifts treats all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tests.benchmarks.train_rows import members_of

# Steps of a turn: a side of one run takes as many as there are here, one of more runs as many fewer.
STEPS_OF_A_TURN = 2


class Gone(Exception):  # noqa: N818 - not an error of the benchmark
    """A side that cannot go on: why."""


class Stepped(Protocol):
    """What takes turns."""

    def step(self) -> int:
        """One step; real tokens. Gone: the side has none to take any more."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Real tokens of the steps of a turn, and their wall seconds."""

    tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        """Real tokens per second."""
        return self.tokens / self.seconds


def take_turns(
    sides: Mapping[str, Stepped],
    *,
    turns: int,
    steps: Mapping[str, int],
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """`turns` turns of each side after `warm_up` steps that are not measured; who is first changes with every round.

    Returns the turns of each side that took them all, and why the others did not.
    """
    found: dict[str, list[Turn]] = {name: [] for name in sides}
    gone: dict[str, str] = {}
    names = list(sides)
    for index in range(-warm_up, turns):
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            if name in gone:
                continue
            count = steps[name] if index >= 0 else 1
            begin = clock()
            try:
                tokens = sum(sides[name].step() for _ in range(count))
            except Gone as reason:
                gone[name] = str(reason)
                del found[name]
                continue
            if index >= 0:
                found[name].append(Turn(tokens, clock() - begin))
    return found, gone


def steps_of_a_turn(side: str) -> int:
    """A turn of a side with few runs is too short for the clock, one with many needs no second step."""
    return max(1, STEPS_OF_A_TURN // members_of(side))


def summary(turns: Mapping[str, Sequence[Turn]], against: str) -> dict[str, dict[str, Any]]:
    """Of each side its speeds with median, least and most, and how many times as fast as `against` it was in the same
    round, with median, least and most."""
    found = {}
    for name, own in turns.items():
        speeds = [turn.speed for turn in own]
        ratios = [mine.speed / other.speed for mine, other in zip(own, turns.get(against, ()), strict=False)]
        found[name] = {
            "turns": [asdict(turn) for turn in own],
            "tokens_per_second": _spread(speeds),
            "ratio": _spread(ratios) if ratios else None,
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
