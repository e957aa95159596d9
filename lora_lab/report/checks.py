"""What `lora-lab doctor` prints: one line for each thing that was looked at, and what follows where it is not right."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TextIO

from rich.console import Console
from rich.text import Text

from lora_lab.report.text import clean, encodable

State = Literal["ok", "warning", "missing"]

_STYLES = {"ok": "green", "warning": "yellow", "missing": "red"}
_LONGEST_STATE = max(map(len, _STYLES))


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. prevents: what cannot be done, and advice: what to do about it, where not ok."""

    check: str
    state: State
    fact: str
    prevents: str | None = None
    advice: str | None = None


def print_check(console: Console, check: Check, *, width: int) -> None:
    """One line, never cut: name (`width` characters), state, fact, what it prevents, what to do."""
    told = "; ".join(part for part in (check.fact, check.prevents, check.advice) if part)
    line = Text.assemble(
        f"{_shown(console, check.check):<{width}}  ",
        (f"{check.state:<{_LONGEST_STATE}}", _STYLES[check.state]),
        f"  {_shown(console, told)}",
    )
    console.print(line, soft_wrap=True)


def write_checks(checks: Sequence[Check], stream: TextIO | None = None) -> None:
    """The same facts as JSON: a list of objects."""
    target = sys.stdout if stream is None else stream
    json.dump([asdict(check) for check in checks], target, indent=2, ensure_ascii=False)
    target.write("\n")


def _shown(console: Console, text: str) -> str:
    return encodable(clean(text), console.encoding)
