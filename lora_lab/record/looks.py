"""Which seeds a call looks at. Looks are written down by `record.verdicts`.

Seeds that are added once a verdict is known are a new look, judged by themselves: with each more that is run until a
verdict pleases, a false one gets likelier. So every page tells their number.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_lab.errors import InputError, Problem
from lora_lab.record.verdicts import Look

_FLAG = "--seeds"


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


def _fresh(looks: Sequence[Look]) -> str:
    """As many as the first look had, after the highest that was used."""
    used = [seed for one in looks for seed in one.seeds]
    first = max(used) + 1
    return f"for example {_FLAG} {_listed(range(first, first + len(looks[0].seeds)), ',')}"


def _listed(seeds: Sequence[int], between: str = ", ") -> str:
    return between.join(map(str, seeds))
