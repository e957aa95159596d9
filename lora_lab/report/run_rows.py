"""Runs as rows of a table that fits a width: state, steps, loss, speed, memory, time.

Columns that do not fit are left out, the least important first, and long names lose their middle; numbers stay whole.
Speed and memory of a cohort are no run's, so they have no column where every run is a member.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_lab.record.result import Status
from lora_lab.report.sweep_view import RunView
from lora_lab.report.text import UNKNOWN, bytes_text, clean, encodable, number_text, seconds_text

_STYLES = {
    Status.COMPLETED: "green",
    Status.STOPPED: "blue",
    Status.DIVERGED: "yellow",
    Status.INTERRUPTED: "yellow",
}
_MEMORY_TITLES = {"rss_bytes": "RSS", "allocated_bytes": "allocated"}
_BY_IMPORTANCE = ("steps", "state", "loss", "time", "speed", "memory")
# Names are cut down to so many cells to make room for a column that is needed, and for any other.
_SHORTEST_NAME, _READABLE_NAME = 10, 24
_NARROW_WIDTH = 60
_SHORTEST_BAR, _LONGEST_BAR = 8, 24


@dataclass(frozen=True, slots=True)
class _Column:
    """`least`: cells that it takes at least, so that the layout does not jump when a number grows."""

    title: str
    texts: tuple[str, ...]
    least: int
    justify: Literal["left", "right"] = "right"
    is_needed: bool = False

    @property
    def cells(self) -> int:
        return max(self.least, len(self.title), *map(len, self.texts))


def run_rows(runs: Sequence[RunView], *, width: int, encoding: str) -> Table:
    """A table of one row per run and a head, at most `width` cells wide where at least name and steps fit."""
    columns = _columns(runs)
    names = [encodable(clean(run.name), encoding) for run in runs]
    gap = 1 if width < _NARROW_WIDTH else 2
    widest = max(cell_len(name) for name in ("run", *names))
    shown = _fitting(columns, widest, width=width, gap=gap)
    room = max(width - sum(columns[key].cells + gap for key in shown), 1)
    name_cells = min(widest, room)
    bar_cells = min(room - name_cells - gap, _LONGEST_BAR) if len(shown) == len(columns) else 0
    styles = ["" if run.is_open else "dim" for run in runs]
    table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    table.add_column("run", width=name_cells, no_wrap=True)
    drawn: list[list[RenderableType]] = [_texts([shortened(name, name_cells, encoding) for name in names], styles)]
    for key in (key for key in columns if key in shown):
        column = columns[key]
        if key == "steps" and bar_cells >= _SHORTEST_BAR:
            table.add_column(width=bar_cells)
            drawn.append([_bar(run, bar_cells) for run in runs])
        table.add_column(column.title, width=column.cells, justify=column.justify, no_wrap=True)
        drawn.append(_texts(column.texts, [state_style(run) for run in runs] if key == "state" else styles))
    for row in zip(*drawn, strict=True):
        table.add_row(*row)
    return table


def shortened(text: str, cells: int, encoding: str, *, keep_end: bool = True) -> str:
    """`text` in at most that many cells, without its middle (names of runs differ most at their ends) or its end."""
    if cell_len(text) <= cells:
        return text
    mark = encodable("…", encoding)[: max(cells, 0)]
    room = cells - len(mark)
    end = _beginning(text[::-1], room // 2)[::-1] if keep_end else ""
    return _beginning(text, room - cell_len(end)) + mark + end


def state_style(run: RunView) -> str:
    """The colour of its state: how it ended, or that it is under way."""
    return "cyan" if run.is_open else _STYLES.get(Status(run.state), "red")


def whole_seconds(seconds: float) -> str:
    """Without the decimals that would flicker."""
    return f"{seconds:.0f} s" if seconds < 59.5 else seconds_text(seconds)


def _columns(runs: Sequence[RunView]) -> dict[str, _Column]:
    """All but the name, in the order in which they stand."""
    kinds = {run.memory_key for run in runs if run.memory_key is not None}
    memory = _MEMORY_TITLES[kinds.pop()] if len(kinds) == 1 else "memory"
    columns = {
        # A phase may have a second word (measuring memory), and a share after a colon.
        "state": _Column("state", tuple(re.split("[ :]", run.state)[0] for run in runs), 9, "left", is_needed=True),
        "steps": _Column("steps", tuple(map(_steps_text, runs)), 5, is_needed=True),
        "loss": _Column("loss", tuple(map(_loss_text, runs)), 6, is_needed=True),
        "speed": _Column("tokens/s", tuple(map(_speed_text, runs)), 8),
        "memory": _Column(memory, tuple(bytes_text(run.memory_bytes) for run in runs), 7),
        "time": _Column("time", tuple(map(_time_text, runs)), 10),
    }
    if runs and all(run.cohort is not None for run in runs):
        del columns["speed"], columns["memory"]
    return columns


def _fitting(columns: Mapping[str, _Column], name_cells: int, *, width: int, gap: int) -> list[str]:
    """The columns that fit beside the name."""
    shown: list[str] = []
    for key in (key for key in _BY_IMPORTANCE if key in columns):
        least_name = min(name_cells, _SHORTEST_NAME if columns[key].is_needed else _READABLE_NAME)
        if least_name + sum(columns[one].cells + gap for one in [*shown, key]) > width:
            break
        shown.append(key)
    return shown


def _beginning(text: str, cells: int) -> str:
    """As much of it as fits."""
    for index, letter in enumerate(text):
        cells -= cell_len(letter)
        if cells < 0:
            return text[:index]
    return text


def _texts(texts: Iterable[str], styles: Iterable[str]) -> list[RenderableType]:
    return [Text(text, style=style) for text, style in zip(texts, styles, strict=True)]


def _steps_text(run: RunView) -> str:
    if share := run.state.partition(": ")[2]:  # scoring says how far it is; its steps are all done
        return share
    if run.steps:
        return f"{run.step}/{run.steps}"
    return str(run.step) if run.step else UNKNOWN


def _loss_text(run: RunView) -> str:
    return UNKNOWN if run.loss is None else number_text(run.loss)


def _speed_text(run: RunView) -> str:
    return UNKNOWN if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"


def _time_text(run: RunView) -> str:
    return whole_seconds(run.seconds) if run.is_open else seconds_text(run.seconds)


def _bar(run: RunView, cells: int) -> RenderableType:
    return ProgressBar(total=run.steps, completed=run.step, width=cells) if run.steps else ""
