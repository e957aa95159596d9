"""The live part of a terminal: how far the sweep is, and a table of the runs that matter now.

It fits the terminal whatever its size, also when that changes. A thread of its own draws it twice a second.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from lora_lab.report.run_rows import run_rows, shortened, state_style, whole_seconds
from lora_lab.report.sweep_view import CohortState, RunView, SweepView
from lora_lab.report.text import bytes_text, clean, encodable, number_text

_FRAMES_PER_SECOND = 2
# From this height on, the last failures are told below the table.
_HIGH = 16
# Lines that hold no run: the cursor's after the last, an empty one, the head of the table.
_FRAME_LINES = 3
# Rows that are kept for runs, however many cohorts there are.
_LEAST_ROWS = 2
_MEMORY_WORDS = {"rss_bytes": "RSS", "allocated_bytes": "allocated"}


class LiveTable(Live):
    """A live display of `view()` that disappears when it stops. What its console prints meanwhile stays above it."""

    def __init__(self, console: Console, view: Callable[[], SweepView], *, redirect_stdout: bool) -> None:
        self._frame = _Frame(view)
        super().__init__(
            self._frame,
            console=console,
            refresh_per_second=_FRAMES_PER_SECOND,
            redirect_stdout=redirect_stdout,
            transient=True,
        )

    def refresh(self) -> None:
        """Draws; a terminal that has gone away is no reason to stop."""
        with contextlib.suppress(OSError):
            super().refresh()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by rich before it draws: rows that the last frame has come to fill in a narrower terminal go first."""
        return [self._frame.erase_wrapped(self.console.width), *super().process_renderables(renderables)]


class _Frame:
    """Draws the view and remembers how long its lines were."""

    def __init__(self, view: Callable[[], SweepView]) -> None:
        self._view = view
        self._line_cells: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawn = draw(self._view(), width=console.width, height=console.height, encoding=console.encoding)
        lines = console.render_lines(drawn, options, pad=False)
        self._line_cells = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()

    def erase_wrapped(self, width: int) -> Control:
        """A terminal made narrower wraps the lines it shows, while rich erases as many rows as it once drew."""
        rows = sum(max(math.ceil(cells / width), 1) for cells in self._line_cells)
        more = rows - len(self._line_cells)
        row = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))
        return Control(ControlType.CARRIAGE_RETURN, *(row * more)) if more > 0 else Control()


def draw(view: SweepView, *, width: int, height: int, encoding: str) -> RenderableType:
    """The view in at most `height - 1` lines of at most `width` cells.

    The last line is empty: there the terminal writes the `^C` of an interruption, which would wrap on a full line.
    """
    head = _packed(_summary(view), width)
    failures = view.failures if height >= _HIGH else ()
    room = max(height - _FRAME_LINES - len(head) - len(failures), 0)
    told, untold = _cohort_lines(view.cohorts, width, max(room - _LEAST_ROWS, 0))
    runs, hidden = _chosen(view, room - len(told) - (untold > 0))
    parts: list[RenderableType] = [Text(line, style="bold", no_wrap=True) for line in head]
    parts += [Text(encodable(line, encoding), style="cyan", no_wrap=True) for line in told]
    if untold:
        parts.append(Text(f"and {untold} more cohorts", style="dim", no_wrap=True))
    if runs:
        parts.append(run_rows(runs, width=width, encoding=encoding))
    if hidden:
        parts.append(Text(f"and {hidden} more running", style="dim", no_wrap=True))
    for run in failures:
        reason = encodable(clean(f"{run.name} {run.state}: {first_line(run.reason)}"), encoding)
        parts.append(Text(shortened(reason, width, encoding, keep_end=False), style=state_style(run), no_wrap=True))
    return Group(*parts, "")


def first_line(reason: str | None) -> str:
    """What a failure says first; the whole of it is in the result."""
    return (reason or "").strip().partition("\n")[0]


def left_text(seconds: float) -> str:
    """`about 40 s`, `about 3 min 05 s`."""
    return f"about {whole_seconds(seconds)}"


def cohort_parts(cohort: CohortState, *, with_progress: bool = True) -> list[str]:
    """What a cohort is at, in words. with_progress: how far its runs are and their losses, which a table of them shows
    anyway."""
    parts = [f"cohort {clean(cohort.id)}: {cohort.seated} of {cohort.seats} seats"]
    if cohort.waiting:
        parts.append(f"{cohort.waiting} waiting")
    losses = [run.loss for run in cohort.members if run.loss is not None]
    if with_progress and cohort.shares is not None:
        parts.append(f"{_range([f'{share:.0%}' for share in cohort.shares])} of the steps")
    if with_progress and losses:
        parts.append(f"loss {_range([number_text(min(losses)), number_text(max(losses))])}")
    if cohort.tokens_per_second is not None:
        parts.append(f"{cohort.tokens_per_second:,.0f} tokens/s")
    if cohort.memory_bytes is not None:
        parts.append(f"{bytes_text(cohort.memory_bytes)} {_MEMORY_WORDS.get(cohort.memory_key or '', '')}".rstrip())
    if cohort.training_seconds_left is not None:
        parts.append(f"{left_text(cohort.training_seconds_left)} of training left")
    return parts


def _range(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _cohort_lines(cohorts: Sequence[CohortState], width: int, room: int) -> tuple[list[str], int]:
    """The lines of as many cohorts as have room, and how many have none."""
    lines: list[str] = []
    for index, cohort in enumerate(cohorts):
        more = _packed(cohort_parts(cohort, with_progress=False), width)
        is_last = index + 1 == len(cohorts)
        if len(lines) + len(more) + (not is_last) > room:
            return lines, len(cohorts) - index
        lines += more
    return lines, 0


def _summary(view: SweepView) -> list[str]:
    counts = [f"{count} {state.lower().replace('_', ' ')}" for state, count in view.outcomes.items()]
    if view.running:
        counts.append(f"{len(view.running)} running")
    if view.waiting:
        counts.append(f"{view.waiting} waiting")
    first, *others = counts or ["none begun"]
    times = [f"{whole_seconds(view.elapsed_seconds)} elapsed"]
    if view.seconds_left is not None:
        times.append(f"{left_text(view.seconds_left)} left")
    return [f"{view.total} runs: {first}", *others, *times]


def _packed(parts: Sequence[str], width: int) -> list[str]:
    """The parts, joined by commas, on as few lines as hold them."""
    lines: list[str] = []
    for index, part in enumerate(parts):
        piece = part + ("," if index + 1 < len(parts) else "")
        if lines and len(lines[-1]) + 1 + len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def _chosen(view: SweepView, rows: int) -> tuple[list[RunView], int]:
    """The runs that get one of `rows` rows, and how many running ones get none: ended ones give way first."""
    running = list(view.running)
    if len(running) > rows:
        kept = max(rows - 1, 0)
        return running[:kept], len(running) - kept
    spare = rows - len(running)
    return [*(view.ended[-spare:] if spare else ()), *running], 0
