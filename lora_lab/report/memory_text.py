"""Predicted memory in a terminal: a bar of the peak's parts, and a small chart of one step. Letters and blocks, no
colour; `text.encodable` has an ASCII form of all of it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lab.plan.prediction import Prediction
from lora_lab.plan.timeline import PARTS, Timeline
from lora_lab.report.memory_words import part_title
from lora_lab.report.text import bytes_text
from lora_lab.study.memory_course import Course, course_of

# One letter per part, in the order of `PARTS`.
LETTERS = dict(zip(PARTS, "WQLGOXTA", strict=True))
_BLOCKS = " ▁▂▃▄▅▆▇█"
_ROWS = 4
_NARROWEST = 20


def memory_bar(prediction: Prediction, *, width: int) -> list[str]:
    """The peak, a bar of `width` characters in which every part has its share of letters, and a line per part."""
    parts = {name: prediction.parts[name] for name in PARTS if prediction.parts.get(name, 0) > 0}
    total = sum(parts.values())
    bar = "".join(
        LETTERS[name] * cells for name, cells in zip(parts, _shares(list(parts.values()), width), strict=True)
    )
    lines = [f"peak {bytes_text(prediction.peak_allocated_bytes)} in {prediction.place}", f"|{bar}|"]
    titles = max((len(part_title(name)) for name in parts), default=0)
    for name, size in parts.items():
        share = f"{100 * size / total:5.1f} %"
        unseen = "" if LETTERS[name] in bar else "  (less than a letter)"
        lines.append(f"  {LETTERS[name]} {part_title(name):<{titles}}  {bytes_text(size):>8}  {share}{unseen}")
    return lines


def _shares(sizes: Sequence[int], cells: int) -> list[int]:
    """`cells` dealt out in proportion, by the largest remainders."""
    total = sum(sizes)
    if not total:
        return [0 for _ in sizes]
    exact = [cells * size / total for size in sizes]
    dealt = [int(one) for one in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda index: dealt[index] - exact[index])
    for index in by_remainder[: cells - sum(dealt)]:
        dealt[index] += 1
    return dealt


def timeline_bar(timeline: Timeline, width: int) -> list[str]:
    """All live bytes over a step: a chart from 0 to the peak, `width` characters wide, and below it the phases.

    A column is the largest moment of equally many operations. Raises ValueError for a timeline without events.
    """
    columns = max(width, _NARROWEST)
    course = course_of(timeline, most_points=max(50 * columns, 3))
    heights = _heights(course, columns)
    top = course.peak.total
    rows = []
    for row in reversed(range(_ROWS)):
        levels = [_level(height / top * _ROWS - row) if top else 0 for height in heights]
        rows.append("".join(_BLOCKS[level] for level in levels).rstrip())
    return [_mark(course, columns), *rows, *_phase_lines(course, columns)]


def _mark(course: Course, columns: int) -> str:
    """A pointer to the column of the peak, its words on the side that has room for them."""
    at, words = (
        _column(course.peak.position, course, columns),
        f"peak {bytes_text(course.peak.total)}: {course.peak.place}",
    )
    return " " * (at - len(words) - 1) + f"{words} v" if at > len(words) else " " * at + f"v {words}"


def _heights(course: Course, columns: int) -> list[int]:
    """The largest moment of each column; one without a point of its own is as high as the one before it."""
    largest: list[int | None] = [None] * columns
    for point in course.points:
        column = _column(point.position, course, columns)
        largest[column] = max(point.total, largest[column] or 0)
    heights: list[int] = []
    for height in largest:
        heights.append(height if height is not None else heights[-1] if heights else 0)
    return heights


def _column(position: int, course: Course, columns: int) -> int:
    return min(position * columns // (course.events + 1), columns - 1)


def _level(share: float) -> int:
    """Eighths of a cell that are filled, to the nearest."""
    return min(max(round(8 * share), 0), 8)


def _phase_lines(course: Course, columns: int) -> list[str]:
    """Names under their first columns; a name that has no room there stands on a line of its own."""
    lines: list[str] = []
    for phase in course.phases:
        at = min(_column(phase.first, course, columns), columns - 1)
        text = f"|{phase.name}"
        for index, line in enumerate(lines):
            if len(line) <= at:
                lines[index] = line.ljust(at) + text
                break
        else:
            lines.append(" " * at + text)
    return lines
