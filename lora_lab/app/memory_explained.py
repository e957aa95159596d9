"""`plan --memory --explain`: the memory of a trial over one step, as a page below ROOT/plans and as bars of text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lab.app.memory_predicted import Predictor
from lora_lab.app.planning import Plan
from lora_lab.plan.row import PlanRow
from lora_lab.record.atomic import make_folder
from lora_lab.record.ledger import run_id_of
from lora_lab.report.memory_page import write_memory_page
from lora_lab.report.memory_text import memory_bar, timeline_bar
from lora_lab.report.terminal_memory import MemoryRow

_FOLDER = "plans"
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass(frozen=True, slots=True)
class Drawing:
    """path: of the page. bars: the same in text, of the peak and of the step."""

    path: Path
    bars: tuple[str, ...]


def explain(
    plan: Plan, rows: Mapping[tuple[str, int], MemoryRow], predictor: Predictor, *, width: int
) -> dict[tuple[str, int], Drawing]:
    """Traces every trial that could be predicted once more, in full depth, and writes its page.

    By fingerprint and repeat. width: of the bars, in characters.

    Raises:
        MachineError: the disk refuses.
    """
    names = Counter(row.row.name for row in rows.values())
    drawings = {}
    for job in plan.jobs:
        key = job.fingerprint, job.repeat
        row = rows[key]
        if row.prediction is None:
            continue
        timeline = predictor.timeline(job)
        path = Path(plan.lab.root) / _FOLDER / f"{_file_name(row.row, is_only=names[row.row.name] == 1)}.html"
        make_folder(path.parent)
        write_memory_page(timeline, row.prediction, path, title=job.name)
        bars = (*memory_bar(row.prediction, width=width), "", *timeline_bar(timeline, width))
        drawings[key] = Drawing(path, bars)
    return drawings


def _file_name(row: PlanRow, *, is_only: bool) -> str:
    """The trial's name, with its id where it is not the only one of that name."""
    name = _UNSAFE.sub("_", row.name)
    return name if is_only else f"{name}-{run_id_of(row.fingerprint, row.repeat)}"
