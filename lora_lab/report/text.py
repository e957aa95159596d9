"""Text for a terminal: names and reasons without control sequences, numbers with units and honest digits."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence

from lora_lab.study.cells import Cell
from lora_lab.study.table import SettingsTable

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # operating system commands: titles, links
    r"|[\x1b\x9b]\[?[0-?]*[ -/]*[@-~]"  # colours, cursor movement
)
_BLOCKS = {**dict.fromkeys("▁▂▃", "."), **dict.fromkeys("▄▅▆", ":"), **dict.fromkeys("▇█", "#")}
_PLAIN = str.maketrans({"±": "+/-", "↑": "^", "↓": "v", "…": "...", **_BLOCKS})
_BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_MOST_DECIMALS = 6

UNKNOWN = "-"


def clean(text: str) -> str:
    """`text` on one line, without escape sequences, control characters and invisible direction marks."""
    if text.isascii() and text.isprintable():
        return text
    visible = _ESCAPES.sub("", text)
    spaced = (" " if character in "\n\r\t" else character for character in visible)
    return "".join(character for character in spaced if unicodedata.category(character) not in ("Cc", "Cf", "Cs"))


def encodable(text: str, encoding: str) -> str:
    """`text` with what `encoding` lacks written in ASCII."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(_PLAIN).encode("ascii", errors="replace").decode("ascii")
    return text


def bytes_text(value: float | None) -> str:
    """Three digits and a decimal unit: GB is 1e9 bytes."""
    if value is None:
        return UNKNOWN
    for size, unit in _BYTE_UNITS:
        if value >= size:
            return f"{_digits(value / size, 3)} {unit}"
    return f"{value:.0f} B"


def seconds_text(value: float | None) -> str:
    """`0.52 s`, `12.3 s`, `3 min 05 s`, `2 h 05 min`."""
    if value is None:
        return UNKNOWN
    if value < 59.95:
        return f"{_digits(value, 3)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes:02d} min"


def count_text(value: float | None) -> str:
    """`4,194,304`."""
    return UNKNOWN if value is None else f"{value:,}"


def number_text(value: float) -> str:
    """Three significant digits, more where the whole part has more."""
    return _digits(value, 3)


def interval_text(mean: float, half_width: float) -> str:
    """`2.71 ± 0.08`: the half width to one digit (two where it begins with 1), the mean to the same decimals."""
    if half_width <= 0 or not math.isfinite(half_width):
        return f"{_digits(mean, 4)} ± {half_width:g}"
    exponent = math.floor(math.log10(half_width))
    decimals = -exponent + (half_width / 10**exponent < 2)
    decimals = min(max(decimals, 0), 12)
    return f"{mean:.{decimals}f} ± {half_width:.{decimals}f}"


def cell_text(cell: Cell) -> str:
    """A setting's score: mean and interval, or the points where there is no interval."""
    if cell.interval is not None:
        return interval_text(cell.interval.mean, cell.interval.half_width)
    return points_text([point.value for point in cell.points]) or UNKNOWN


def stopped_notes(table: SettingsTable) -> list[str]:
    """How many runs a search has stopped early, in one sentence; nothing where there are none."""
    stopped = sum(row.stopped for row in table.rows)
    if not stopped:
        return []
    runs, cut = sum(row.runs for row in table.rows), [row for row in table.rows if row.stopped and row.completed]
    told = "was stopped early by the search and is" if stopped == 1 else "were stopped early by the search and are"
    note = f"{stopped} of {runs} runs {told} in no mean"
    if cut:
        names = ", ".join(clean(row.name) for row in cut)
        note += f"; not compared with others, since what they have left are their better runs: {names}"
    return [f"{note}."]


def value_text(value: object) -> str:
    """A value of a configuration."""
    return value if isinstance(value, str) else json.dumps(value)


def points_text(values: Sequence[float]) -> str:
    """`2.70, 2.75`: equal decimals for all, as many as tell different values apart (up to six)."""
    decimals = max((_decimals(value, 3) for value in values), default=0)
    while decimals < _MOST_DECIMALS and len({f"{value:.{decimals}f}" for value in values}) < len(set(values)):
        decimals += 1
    return ", ".join(f"{value:.{decimals}f}" for value in values)


def _digits(value: float, significant: int) -> str:
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{significant}g}"
    return f"{value:.{_decimals(value, significant)}f}"


def _decimals(value: float, significant: int) -> int:
    if value == 0:
        return significant - 1
    return min(max(significant - 1 - math.floor(math.log10(abs(value))), 0), 12)
