"""What is known of a study's points before anything runs: `planned.json`, read by formulas with `planned(NAME, ARM)`.

By run id: parameters as they are counted, bytes of the step as they are predicted (`predicted_...`), every number under
the name that formulas use. `missing` says why a number that was looked for is absent; `notes`, what it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lab.errors import DataError, Problem
from lora_lab.plan.prediction import Prediction
from lora_lab.record.atomic import read_json, write_json

_FILE = "planned.json"


@dataclass(frozen=True, slots=True)
class PlannedFacts:
    """Of one point. values: counts, and bytes where the name ends so."""

    values: Mapping[str, int]
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def by_name(self) -> dict[str, int | str]:
        """Each number by its name, or the reason why it has none."""
        return {**self.missing, **self.values}


def predicted_values(prediction: Prediction) -> dict[str, int]:
    """The bytes of a prediction by the names that formulas use; those of its parts add up to the peak."""
    values = {
        "predicted_peak_allocated_bytes": prediction.peak_allocated_bytes,
        "predicted_paged_bytes": prediction.paged_bytes,
        "predicted_base_bytes": prediction.base_bytes,
        **{f"predicted_{part}_bytes": size for part, size in prediction.parts.items()},
    }
    if prediction.peak_reserved_bytes is not None:
        values["predicted_peak_reserved_bytes"] = prediction.peak_reserved_bytes
    return values


def write_planned(folder: Path, facts: Mapping[str, PlannedFacts]) -> None:
    """Puts them in place; raises MachineError where the disk refuses."""
    rows = {
        run_id: {**one.values, "missing": dict(one.missing), "notes": list(one.notes)} for run_id, one in facts.items()
    }
    write_json(folder / _FILE, rows)


def read_planned(folder: Path) -> dict[str, PlannedFacts]:
    """By run id; none where nothing was asked for.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return {}
    rows = read_json(path)
    try:
        return {run_id: _facts(dict(row)) for run_id, row in rows.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(Problem(str(path), f"damaged: {error!r}; reproduce the study again to mend it")) from None


def _facts(row: dict[str, Any]) -> PlannedFacts:
    missing, notes = dict(row.pop("missing")), tuple(map(str, row.pop("notes")))
    if not all(type(value) is int for value in row.values()):
        raise ValueError("expected whole numbers")
    return PlannedFacts(row, missing, notes)
