"""One series of a step log, thinned by averaging over equal bins of steps.

Losses are weighted by their tokens, speed is tokens over seconds, all else is averaged plainly. A value that is not
finite ends its series; one that a step does not have is absent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.record.step_log import NONFINITE

SPEED = "tokens_per_second"
# What these two take from a line; the second of each is the weight in a bin. All other keys are plain values.
_NEEDED = {"loss": ("loss", "loss_tokens"), SPEED: ("tokens", "seconds")}
_NONFINITE_TEXTS = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True, slots=True)
class Series:
    """Values by step, ascending. `ended`: which value that is not finite cut it off, and where."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    ended: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {"steps": list(self.steps), "values": list(self.values), "ended": self.ended}


def series_of(lines: Mapping[int, Mapping[str, Any]], key: str, width: int) -> Series:
    """The values of a key in bins of `width` steps. `lines`: of a step log, by step, ascending."""
    entries: list[tuple[int, float, float]] = []
    ended = None
    last = max(lines, default=0)
    for step, line in lines.items():
        bad = _nonfinite(line, key)
        if bad is not None:
            ended, last = f"{bad} at step {step}", step - 1
            break
        entry = _entry(line, key)
        if entry is not None:
            entries.append((step, *entry))
    steps: list[int] = []
    values: list[float] = []
    for place, group in itertools.groupby(entries, key=lambda entry: (entry[0] - 1) // width):
        steps.append(min((place + 1) * width, last))
        values.append(_mean([(value, weight) for _, value, weight in group]))
    return Series(tuple(steps), tuple(values), ended)


def _nonfinite(line: Mapping[str, Any], key: str) -> str | None:
    """How a value that the curve needs fails to be finite in this line."""
    named = line.get(NONFINITE)
    for needed in _NEEDED.get(key, (key,)):
        if isinstance(named, Mapping) and needed in named:
            return str(named[needed]) if named[needed] in _NONFINITE_TEXTS else "not finite"
        value = _number(line.get(needed))
        if value is not None and not math.isfinite(value):
            return "not finite"
    return None


def _entry(line: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Value and weight; None where the line lacks one, or where there is nothing to weigh it by."""
    if key not in _NEEDED:
        value = _number(line.get(key))
        return None if value is None else (value, 1.0)
    first, second = (_number(line.get(needed)) for needed in _NEEDED[key])
    if first is None or second is None or second <= 0:
        return None
    return (first / second if key == SPEED else first), second


def _number(value: object) -> float | None:
    """JSON has integers that no float can hold; such a one is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    if len(weighted) == 1:
        return weighted[0][0]
    total = math.fsum(weight for _, weight in weighted)
    return math.fsum(value * (weight / total) for value, weight in weighted)
