"""The peak of memory as it was predicted before a run, and as it was measured of it: two numbers that may be compared.

Only where the measured peak is the run's own, and where the run ended by itself or by its search: one that failed or
ran out of memory may not have reached its peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lab.plan.timeline import PARTS
from lora_lab.record.cohort_facts import owns_peak
from lora_lab.record.result import Result, Status

PEAK = "peak_allocated_bytes"
# Of what was measured, as W&B and the exported rows name it.
ERROR = "predicted_peak_error_fraction"
# Where a result keeps the whole prediction (`plan.prediction.Prediction.to_json`).
FACT = "prediction"
TRAINED = (Status.COMPLETED, Status.STOPPED, Status.DIVERGED)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Allocated bytes."""

    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """What was predicted too much, as a fraction of what was measured; below 0 it was too little."""
        return (self.predicted - self.measured) / self.measured


def measured_peak(result: Result) -> int | None:
    """The peak of the run itself; None where it was not measured, is others' too, or was perhaps not reached."""
    peak = result.measurements.get(PEAK)
    return int(peak) if peak and owns_peak(result) and result.status in TRAINED else None


def peaks_of(result: Result) -> Peaks | None:
    """Both peaks; None where one of them is missing."""
    predicted, measured = result.predicted_peak_allocated_bytes, measured_peak(result)
    return None if predicted is None or measured is None else Peaks(predicted, measured)


def predicted_parts(result: Result) -> dict[str, int]:
    """Parts of the predicted peak by name (all of `plan.timeline.PARTS`); empty where the result keeps none."""
    told: Any = result.facts.get(FACT)
    parts = told.get("parts") if isinstance(told, Mapping) else None
    if not isinstance(parts, Mapping) or not all(isinstance(parts.get(name), int) for name in PARTS):
        return {}
    return {name: parts[name] for name in PARTS}
