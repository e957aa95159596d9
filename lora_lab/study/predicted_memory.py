"""What was predicted of the peak of memory beside what was measured: over runs, and part by part within one.

Which runs have two numbers that may be compared: `record.predicted_peak`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lab.record.predicted_peak import FACT, TRAINED, Peaks, measured_peak, peaks_of, predicted_parts
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunRecord
from lora_lab.study.settings import is_base

_WEIGHT_GROUP, _STATE_GROUP = "all weights", "optimizer state"
_REST_GROUP = "gradients, activations, temporary"
# Groups of predicted parts that have a measured counterpart.
_GROUPS = {
    _WEIGHT_GROUP: ("weights", "quantization_constants", "adapter"),
    _STATE_GROUP: ("optimizer_state",),
    _REST_GROUP: ("gradients", "activations", "temporary"),
}
_WEIGHTS = ("frozen_weight_bytes", "trainable_weight_bytes")
_STATE = "optimizer_state_bytes"


@dataclass(frozen=True, slots=True)
class PeakPair:
    """Both peaks of one run. device: as the run names it, None where it does not."""

    run_id: str
    name: str
    setting: str | None
    device: str | None
    peaks: Peaks

    def to_json(self) -> dict[str, Any]:
        """Bytes, and the error as a fraction of what was measured."""
        return {
            "run_id": self.run_id,
            "name": self.name,
            "device": self.device,
            "predicted_peak_allocated_bytes": self.peaks.predicted,
            "peak_allocated_bytes": self.peaks.measured,
            "error": self.peaks.error,
        }


@dataclass(frozen=True, slots=True)
class PredictedMemory:
    """median_error: of the absolute errors, a fraction; largest: the run with the largest of them; both None where no
    run has both peaks. without: how many other trained runs lack one of the two."""

    pairs: tuple[PeakPair, ...]
    median_error: float | None
    largest: PeakPair | None
    without: int

    def to_json(self) -> dict[str, Any]:
        """All fields; the largest error with its sign."""
        return {
            "count": len(self.pairs),
            "without": self.without,
            "median_absolute_error": self.median_error,
            "largest_error": None if self.largest is None else self.largest.peaks.error,
            "largest_error_run": None if self.largest is None else self.largest.run_id,
            "runs": [pair.to_json() for pair in self.pairs],
        }


def predicted_memory(records: Iterable[RunRecord]) -> PredictedMemory:
    """Predicted and measured peaks of these runs, in their order."""
    pairs: list[PeakPair] = []
    trained = 0
    for record in records:
        result = record.result
        if result is None or record.header is None or result.status not in TRAINED or is_base(record.trial):
            continue
        trained += 1
        if (peaks := peaks_of(result)) is not None:
            device = result.facts.get("device")
            told = None if device is None else str(device)
            pairs.append(PeakPair(record.run_id, record.name, record.setting, told, peaks))
    return PredictedMemory(
        pairs=tuple(pairs),
        median_error=statistics.median(abs(pair.peaks.error) for pair in pairs) if pairs else None,
        largest=max(pairs, key=lambda pair: abs(pair.peaks.error), default=None),
        without=trained - len(pairs),
    )


@dataclass(frozen=True, slots=True)
class PartPair:
    """Parts of the predicted peak, and what was measured of the same bytes: None where nothing was, or where only the
    group that the part belongs to (`is_detail`) could be."""

    title: str
    predicted_bytes: int
    measured_bytes: int | None
    is_detail: bool


def part_pairs(result: Result) -> list[PartPair]:
    """The predicted peak in groups of parts that have a measured counterpart, each before its parts, and the whole.

    Measured are all weights together (frozen and trained, for an adapter is weights too); the optimizer's state, at the
    end of the training; and the peak, so that the rest of it has a counterpart as well. Nothing where the result keeps
    no parts; no measured bytes where the peak is not the run's own, nor of states in managed memory, which are no part
    of a predicted peak.
    """
    parts = predicted_parts(result)
    if not parts:
        return []
    measured = _measured_groups(result)
    pairs = []
    for title, names in _GROUPS.items():
        pairs.append(PartPair(title, sum(parts[name] for name in names), measured.get(title), is_detail=False))
        details = [name for name in names if parts[name]]
        if len(details) > 1:
            pairs += [PartPair(name.replace("_", " "), parts[name], None, is_detail=True) for name in details]
    return [*pairs, PartPair("peak", sum(parts.values()), measured.get("peak"), is_detail=False)]


def _measured_groups(result: Result) -> dict[str, int]:
    """Measured bytes by group, as far as they are known."""
    peak = measured_peak(result)
    if peak is None:
        return {}
    known, found = result.measurements, {"peak": peak}
    if all(name in known for name in _WEIGHTS):
        found[_WEIGHT_GROUP] = int(sum(known[name] for name in _WEIGHTS))
    if _STATE in known and not _is_paged(result):
        found[_STATE_GROUP] = int(known[_STATE])
        if _WEIGHT_GROUP in found:
            found[_REST_GROUP] = peak - found[_WEIGHT_GROUP] - found[_STATE_GROUP]
    return found


def _is_paged(result: Result) -> bool:
    told = result.facts[FACT]
    return isinstance(told, Mapping) and bool(told.get("paged_bytes"))
