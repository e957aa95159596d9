"""Everything the lab raises on purpose.

LabError
├── InputError      what the user asked for cannot be done        exit 2
│   └── DataError   a data file or data set is not usable          exit 2
├── MachineError    device, disk or network                        exit 4
├── Diverged        loss or gradient norm stopped being finite     an outcome (Status.DIVERGED)
├── EvaluationError a score could not be computed honestly         an outcome (Status.FAILED)
└── IdentityError   weights or data are not what was declared      exit 2

An error carries *problems*: each says where, what value, what rule and, where there is one, the nearest valid choice.
They are collected, so that one try shows all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `where` is a key (`learning_rate`), an override, or `file:line`."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class LabError(Exception):
    """Base of all errors the lab raises on purpose; printed without a traceback."""

    exit_code = 1

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class InputError(LabError):
    """What the user asked for is not valid, or not possible. Raised before any model loads."""

    exit_code = 2


class DataError(InputError):
    """A data file or data set is not usable; `where` is `path:line` when a line is to blame."""


class IdentityError(InputError):
    """Weights or data on this machine are not the ones the configuration declares."""


class MachineError(LabError):
    """The device, the disk or the network refuses."""

    exit_code = 4


class EvaluationError(LabError):
    """A score could not be computed honestly, for example a log-likelihood was NaN."""


def nearest(name: str, choices: Sequence[str]) -> str:
    """The end of an error message: ` (did you mean "x"?)` when something is close, and always the choices."""
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f'; did you mean "{matches[0]}"?' if matches else ""
    return f"{hint} (choices: {', '.join(choices)})"


def first_line(error: object) -> str:
    """What an error of another library says, as far as it fits into a message: its first line, 300 characters."""
    return str(error).strip().split("\n")[0][:300]
