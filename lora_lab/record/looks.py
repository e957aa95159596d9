"""Looks at a study: which seeds were judged together, in the order in which it was decided to run them (`looks.json`).

Seeds that are added once a verdict is known are a new look, judged by themselves: with each more that is run until a
verdict pleases, a false one gets likelier. So a look is written down before its first run, and every page tells their
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_lab.errors import DataError, InputError, Problem
from lora_lab.record.atomic import read_json, write_json
from lora_lab.record.environment import utc_now

_FILE = "looks.json"
_FLAG = "--seeds"


@dataclass(frozen=True, slots=True)
class Look:
    """seeds: empty where the study names none. begun_at: UTC."""

    seeds: tuple[int, ...]
    begun_at: str

    def to_json(self) -> dict[str, object]:
        """All fields."""
        return {**asdict(self), "seeds": list(self.seeds)}


def read_looks(folder: Path) -> tuple[Look, ...]:
    """The looks that were begun, the first one first.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return ()
    content = read_json(path)
    try:
        return tuple(Look(tuple(map(int, one["seeds"])), str(one["begun_at"])) for one in content["looks"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(Problem(str(path), f"damaged: {error!r}")) from None


def seeds_of_look(
    looks: Sequence[Look], asked: Sequence[int] | None, *, registered: Sequence[int], tuning: Sequence[int]
) -> tuple[int, ...]:
    """The seeds that a call is about: those asked for, else those of the last look, else those of the study.

    Args:
        asked: as given by `--seeds`; those of an earlier look mean that look.
        registered, tuning: the study's own.

    Raises:
        InputError: seeds asked for before the first look, twice, of tuning, or some of an earlier look.
    """
    if asked is None:
        return looks[-1].seeds if looks else tuple(registered)
    if any(set(one.seeds) == set(asked) and len(one.seeds) == len(asked) for one in looks):
        return tuple(asked)
    problems = []
    if not registered:
        problems.append("the study draws no seeds (it has no seeds:), so none can be added")
    elif not looks and set(asked) != set(registered):
        problems.append(f"the first look is at the study's own seeds, {_listed(registered)}; run it without {_FLAG}")
    if len(set(asked)) < len(asked):
        problems.append(f"each once, got {_listed(asked)}")
    if shared := sorted(set(asked) & set(tuning)):
        problems.append(f"{_listed(shared)} served tuning; a rate is not judged on what picked it")
    for number, one in enumerate(looks, start=1):
        if shared := sorted(set(asked) & set(one.seeds)):
            rule = "fresh seeds are judged by themselves"
            problems.append(
                f"{_listed(shared)} belong to look {number} ({_listed(one.seeds)}); {rule}: {_fresh(looks)}"
            )
    if problems:
        raise InputError([Problem(_FLAG, text) for text in problems])
    return tuple(asked)


def begin_look(folder: Path, seeds: Sequence[int]) -> tuple[Look, ...]:
    """Writes a look down, unless it is one of those that were begun; returns all of them.

    Raises:
        DataError: the file is damaged. MachineError: the disk refuses.
    """
    looks = read_looks(folder)
    if any(set(one.seeds) == set(seeds) for one in looks):
        return looks
    looks = (*looks, Look(tuple(seeds), utc_now()))
    write_json(folder / _FILE, {"looks": [one.to_json() for one in looks]})
    return looks


def _fresh(looks: Sequence[Look]) -> str:
    """As many as the first look had, after the highest that was used."""
    used = [seed for one in looks for seed in one.seeds]
    first = max(used) + 1
    return f"for example {_FLAG} {_listed(range(first, first + len(looks[0].seeds)), ',')}"


def _listed(seeds: Sequence[int], between: str = ", ") -> str:
    return between.join(map(str, seeds))
