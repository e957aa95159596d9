"""Printing of tables: in full in a pipe, fitted to the width in a terminal without ever cutting a number.

A table that is too wide for the terminal loses its optional columns from the right, and says which. If that is not
enough all columns are printed in several tables below each other, the first column repeated; and where not even two
columns fit, every row as a list.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_lab.report.text import clean, encodable

# Wider than any table, so that nothing is wrapped or cut in a pipe.
_PIPE_WIDTH = 100_000


@dataclass(frozen=True, slots=True)
class Column:
    """Numbers stand to the right. An optional column may be left out in a narrow terminal."""

    title: str
    is_number: bool = False
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of plain text; the first column names the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


class _Console(Console):
    """rich ends the process with code 1 when a reader such as `head` leaves; here the caller decides."""

    def on_broken_pipe(self) -> None:
        """What is left in the stream's buffer goes nowhere, so that Python does not complain of it at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
        raise BrokenPipeError


def console_for(stream: TextIO | None) -> Console:
    """A console on `stream` (None: stdout): colour and width of a terminal, or neither in a pipe."""
    target = sys.stdout if stream is None else stream
    if target.isatty():
        return _Console(file=target, highlight=False)
    return _Console(file=target, highlight=False, no_color=True, force_terminal=False, width=_PIPE_WIDTH)


def print_line(console: Console, text: str, *, style: str = "") -> None:
    """One line of text, never cut; markup and control sequences in it are shown as text or dropped."""
    console.print(Text(_shown(console, text), style=style), soft_wrap=True)


def print_grid(console: Console, grid: Grid) -> None:
    """The table, in the widest form that fits."""
    shown = list(range(len(grid.columns)))
    dropped: list[str] = []
    while not _fits(console, grid, shown):
        optional = [index for index in shown if grid.columns[index].is_optional]
        if not optional:
            _print_in_parts(console, grid)
            return
        shown.remove(optional[-1])
        dropped.insert(0, grid.columns[optional[-1]].title)
    console.print(_table(console, grid, shown))
    if dropped:
        print_line(console, f"(left out in this width: {', '.join(dropped)})", style="dim")


def _shown(console: Console, text: str) -> str:
    return encodable(clean(text), console.encoding)


def _fits(console: Console, grid: Grid, shown: Sequence[int]) -> bool:
    """Whether the widest cells fit side by side; rich's own measure stops at the console's width."""
    cells = 0
    for index in shown:
        texts = [grid.columns[index].title, *(row[index] for row in grid.rows)]
        cells += max(Text(_shown(console, text)).cell_len for text in texts)
    return cells + 3 * len(shown) + 1 <= console.width


def _table(console: Console, grid: Grid, shown: Sequence[int]) -> Table:
    style = box.SIMPLE_HEAD if console.is_terminal and console.encoding.startswith("utf") else None
    table = Table(box=style, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index in shown:
        column = grid.columns[index]
        justify = "right" if column.is_number else "left"
        table.add_column(Text(_shown(console, column.title)), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in grid.rows:
        table.add_row(*(Text(_shown(console, row[index])) for index in shown))
    return table


def _print_in_parts(console: Console, grid: Grid) -> None:
    parts: list[list[int]] = []
    for index in range(1, len(grid.columns)):
        if not _fits(console, grid, [0, index]):
            _print_stacked(console, grid)
            return
        if parts and _fits(console, grid, [*parts[-1], index]):
            parts[-1].append(index)
        else:
            parts.append([0, index])
    for part in parts:
        console.print(_table(console, grid, part))
        print_line(console, "")


def _print_stacked(console: Console, grid: Grid) -> None:
    for row in grid.rows:
        print_line(console, row[0], style="bold")
        for column, value in zip(grid.columns[1:], row[1:], strict=True):
            print_line(console, f"  {column.title}: {value}")
