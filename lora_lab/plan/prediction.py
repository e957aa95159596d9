"""What is predicted of a run's memory before anything is loaded: plain values, as they are shown, kept and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

DeviceKind = Literal["cpu", "cuda"]
Style = Literal["own", "hf", "litgpt", "litgpt_first"]


@dataclass(frozen=True, slots=True)
class LongestRows:
    """The rows of the largest optimizer step, longest first: as many as a batch has, or as there are.

    lengths: tokens of each. loss_tokens: of each, those that count in the loss. source: where both come from, in words
    ("the longest of 512 rows"; "data.max_length, since the rows are not here").
    """

    lengths: tuple[int, ...]
    loss_tokens: tuple[int, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one run by itself, on a kind of device (`cpu`: exact bytes of live tensors; `cuda`: as its allocator counts).

    peak_allocated_bytes: at the largest moment of a training step; `parts` (keys: `timeline.PARTS`) add up to it, and
    `place` says where in the step. peak_reserved_bytes: what CUDA's allocator holds for it; None on a CPU. paged_bytes:
    optimizer states in managed memory, which is not part of either. base_bytes: weights and quantization constants,
    which runs on one base share. how: traced in full, or extrapolated from two depths. notes: assumptions that a
    reader should know.
    """

    device_kind: DeviceKind
    style: Style
    trainable_parameters: int
    total_parameters: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    parts: Mapping[str, int]
    place: str
    paged_bytes: int
    base_bytes: int
    micro_batch_size: int
    longest_row: int
    rows: str
    how: str
    notes: tuple[str, ...]

    @property
    def own_bytes(self) -> int:
        """What one more run on the same base takes beside it."""
        return self.peak_allocated_bytes - self.base_bytes

    def to_json(self) -> dict[str, Any]:
        """JSON values; `prediction_of` reads them back."""
        return asdict(self)


def prediction_of(values: Mapping[str, Any]) -> Prediction:
    """The inverse of `to_json`; raises TypeError or KeyError for anything else."""
    return Prediction(**{**values, "notes": tuple(values["notes"])})
