"""The page that explains a predicted peak: memory over one training step, and what is alive at its peak."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lab.plan.prediction import Prediction
from lora_lab.plan.timeline import PARTS, Timeline
from lora_lab.record.atomic import write_text
from lora_lab.record.environment import utc_now
from lora_lab.report.memory_figures import PART_COLOURS, course_figures
from lora_lab.report.memory_words import part_title, prediction_facts, prediction_sentence
from lora_lab.report.self_contained import rendered
from lora_lab.report.text import bytes_text, clean
from lora_lab.study.memory_course import Course, alive_at_peak, course_of

_POINTS = 2_000
_MOST_ALIVE = 30


def write_memory_page(timeline: Timeline, prediction: Prediction, path: Path, *, title: str) -> None:
    """Draws the page and puts it in place of an earlier one, whole.

    title: what was planned, as a run's name. The timeline may be counted otherwise than the prediction (another device,
    another depth): then both peaks are shown.

    Raises:
        MachineError: the disk refuses.
        ValueError: the timeline has no events.
    """
    write_text(path, draw_memory_page(timeline, prediction, title=title))


def draw_memory_page(timeline: Timeline, prediction: Prediction, *, title: str) -> str:
    """The page as HTML."""
    course = course_of(timeline, most_points=_POINTS)
    alive = alive_at_peak(timeline)
    drawn = dict(zip(PARTS, course.peak.parts, strict=True))
    page = {
        "title": clean(title),
        "answer": prediction_sentence(prediction),
        "facts": [{"name": name, "value": value} for name, value in prediction_facts(prediction)],
        "legend": _legend(course),
        "parts": _parts(prediction.parts, drawn),
        "is_other": dict(prediction.parts) != drawn,
        "alive": [
            {
                "place": one.where,
                "part": part_title(one.part),
                "colour": PART_COLOURS[one.part],
                "storages": one.storages,
                "bytes": one.total_bytes,
                "gigabytes": _gigabytes(one.total_bytes),
                "largest": one.largest_bytes,
                "largest_text": bytes_text(one.largest_bytes),
            }
            for one in alive[:_MOST_ALIVE]
        ],
        "left_out": _left_out([one.total_bytes for one in alive[_MOST_ALIVE:]]),
        "notes": [clean(note) for note in prediction.notes],
        "drawn_at": utc_now()[:16].replace("T", " ") + " UTC",
    }
    return rendered("memory.html.j2", page, {"figures-timeline": course_figures(course)})


def _legend(course: Course) -> str:
    told = f"Live bytes after each of the {course.events:,} times that a tensor's memory comes alive or dies in a step."
    if course.width > 1:
        told += f" Of every {course.width} in a row the largest moment is drawn."
    return told + " A click on a name of the legend hides or shows it."


def _parts(predicted: Mapping[str, int], drawn: Mapping[str, int]) -> list[dict[str, Any]]:
    total = sum(predicted.values())
    rows = [(part_title(part), PART_COLOURS[part], predicted.get(part, 0), drawn[part]) for part in PARTS]
    return [
        {
            "title": title,
            "colour": colour,
            "bytes": size,
            "gigabytes": _gigabytes(size),
            "share": f"{100 * size / total:.1f} %" if total else "-",
            "drawn": in_drawing,
        }
        for title, colour, size, in_drawing in [*rows, ("all", None, total, sum(drawn.values()))]
    ]


def _gigabytes(size: int) -> str:
    """Of 1e9 bytes, to a millionth where it is small."""
    return f"{size / 1e9:.3f}" if size >= 1e8 else f"{size / 1e9:.6f}"


def _left_out(sizes: list[int]) -> str | None:
    return f"{len(sizes)} more places, {bytes_text(sum(sizes))} in all." if sizes else None
