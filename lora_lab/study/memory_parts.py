"""What a setting's peak memory is made of: weights, gradients, optimizer state, and the rest.

Weights are counted when the adapter is attached, 4-bit constants included; optimizer state at the end of training;
gradients and the peak on one counted step on the longest rows. At the end of a step those four are alive together, so
the peak is never less than their sum. The rest is what the peak has on top: activations and temporaries. Where the peak
is reached before the backward pass has made all gradients, activations are larger than the rest by those still to come.

On CUDA the peak is the allocator's and gradients are not counted, so the parts are missing there. The peak of a cohort
is no run's own (`cost.comparable_runs`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.cost import comparable_runs
from lora_lab.study.table import SettingRow

REST = "activation_and_temporary_bytes"
_PEAK = "peak_allocated_bytes"

# The parts in the order in which they are stacked, with their titles.
PARTS = MappingProxyType(
    {
        "frozen_weight_bytes": "frozen weights",
        "trainable_weight_bytes": "trained weights",
        "gradient_bytes": "gradients",
        "optimizer_state_bytes": "optimizer state",
        REST: "activations and temporaries",
    }
)
_MEASURED = tuple(name for name in PARTS if name != REST)


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes of the setting's run with the largest peak. `parts` add up to `peak_bytes`; all keys of PARTS, or none and
    then `missing` says why. `predicted_bytes`: the peak predicted for that run, None where nothing was predicted."""

    name: str
    setting: str
    run_id: str | None
    device: str | None
    peak_bytes: int | None
    predicted_bytes: int | None
    parts: dict[str, int]
    missing: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "name": self.name,
            "setting": self.setting,
            "run_id": self.run_id,
            "device": self.device,
            "peak_allocated_bytes": self.peak_bytes,
            "predicted_peak_allocated_bytes": self.predicted_bytes,
            "parts": self.parts,
            "missing": self.missing,
        }


def memory_parts(records: Iterable[RunRecord], row: SettingRow) -> MemoryParts | None:
    """The parts of a setting's peak, from its completed runs among `records`; None for an untouched base, which has no
    training step."""
    if row.is_base:
        return None
    completed = [
        (record, record.result)
        for record in records
        if record.setting == row.setting and record.result is not None and record.state == Status.COMPLETED
    ]
    own, why = comparable_runs(completed, _PEAK)
    peaks = [result for _, result in own if _PEAK in result.measurements]
    if not peaks:
        reasons = [result.missing[_PEAK] for _, result in own if _PEAK in result.missing]
        missing = "no completed run" if not completed else why or (reasons or ["the peak was not measured"])[0]
        return MemoryParts(row.name, row.setting, None, None, None, None, {}, missing)
    return _parts_of(row, max(peaks, key=lambda result: result.measurements[_PEAK]))


def _parts_of(row: SettingRow, result: Result) -> MemoryParts:
    peak = int(result.measurements[_PEAK])
    parts = {name: int(result.measurements[name]) for name in _MEASURED if name in result.measurements}
    absent = [name for name in _MEASURED if name not in parts]
    rest = peak - sum(parts.values())
    missing = None
    if absent:
        missing = "; ".join(f"no {name}: {result.missing.get(name, 'not measured')}" for name in absent)
    elif rest < 0:
        missing = f"weights, gradients and optimizer state are {-rest} bytes more than the peak of {peak} bytes"
    device = result.facts.get("device")
    return MemoryParts(
        name=row.name,
        setting=row.setting,
        run_id=result.run_id,
        device=None if device is None else str(device),
        peak_bytes=peak,
        predicted_bytes=result.predicted_peak_allocated_bytes,
        parts={} if missing is not None else {**parts, REST: rest},
        missing=missing,
    )
