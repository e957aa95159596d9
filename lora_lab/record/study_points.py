"""Which run is which point of a study: `points.json` beside the study's other files, written before a run begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.errors import DataError, Problem
from lora_lab.plan.stages import Stage
from lora_lab.record.atomic import read_json, write_json

_POINTS_FILE = "points.json"


@dataclass(frozen=True, slots=True)
class StudyPoint:
    """One point: the values of the study file that made it (`tuned` still in place of a picked rate), the run that it
    became, and the learning rate where tuning picked it."""

    stage: Stage
    values: Mapping[str, Any]
    run_id: str
    rate: float | None = None


def write_points(folder: Path, points: Sequence[StudyPoint]) -> None:
    """Puts a study's points in place; raises MachineError where the disk refuses."""
    rows = [{"stage": one.stage, "values": dict(one.values), "run_id": one.run_id, "rate": one.rate} for one in points]
    write_json(folder / _POINTS_FILE, {"points": rows})


def read_points(folder: Path) -> tuple[StudyPoint, ...]:
    """A study's points; none where nothing was asked for yet.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / _POINTS_FILE
    if not path.is_file():
        return ()
    content = read_json(path)
    try:
        return tuple(
            StudyPoint(row["stage"], dict(row["values"]), str(row["run_id"]), row["rate"]) for row in content["points"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(Problem(str(path), f"damaged: {error!r}; run the study again to mend it")) from None
