"""Memory over one training step: which bytes come alive and die, operation by operation, and what they are.

No torch: a timeline is recorded in `memory.live_bytes`, kept as JSON, extrapolated, drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

# What bytes are, in the order in which they are shown. weights: of the base, as they lie in memory (packed where they
# are quantized). temporary: buffers of operations, gradients on their way back, layers that are computed once more.
# allocator: what CUDA's allocator hands out beside tensors (cuBLAS's workspaces, rests of blocks that are not split).
PARTS = (
    "weights",
    "quantization_constants",
    "adapter",
    "gradients",
    "optimizer_state",
    "activations",
    "temporary",
    "allocator",
)


class Place(NamedTuple):
    """Where in a step. phase: forward, backward, clip or update. layer: the decoder layer that is computed, or None.

    after: of a place in no layer, whether it comes after the layers (head and loss) or before them (embedding).
    """

    phase: str
    layer: int | None = None
    after: bool = False

    def __str__(self) -> str:
        if self.layer is not None:
            return f"{self.phase}, layer {self.layer}"
        if self.phase not in ("forward", "backward"):
            return self.phase
        # Going back, the head is what comes first.
        return f"{self.phase}, {'head and loss' if self.after == (self.phase == 'forward') else 'embedding'}"


class Event(NamedTuple):
    """A storage comes alive (change > 0) or dies (change < 0). change: bytes. storage: its number."""

    storage: int
    change: int
    place: Place


@dataclass(frozen=True, slots=True)
class Moment:
    """Live bytes at one moment, by part."""

    place: Place
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All live bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Timeline:
    """events: in order; those with which the step begins (weights, states) come first, at `START`.

    parts: what each storage turned out to be; those that are not listed are temporary.
    """

    events: tuple[Event, ...]
    parts: Mapping[int, str] = field(default_factory=dict)

    def moments(self) -> Iterator[Moment]:
        """Live bytes after each event."""
        live = dict.fromkeys(PARTS, 0)
        for event in self.events:
            live[self.parts.get(event.storage, "temporary")] += event.change
            yield Moment(event.place, dict(live))

    @cached_property
    def peaks(self) -> dict[Place, Moment]:
        """The largest moment at each place, in the order of the places."""
        live = dict.fromkeys(PARTS, 0)
        total = 0
        found: dict[Place, tuple[int, Moment]] = {}
        for event in self.events:
            live[self.parts.get(event.storage, "temporary")] += event.change
            total += event.change
            if event.place not in found or total > found[event.place][0]:
                found[event.place] = total, Moment(event.place, dict(live))
        return {place: moment for place, (_, moment) in found.items()}

    @property
    def peak(self) -> Moment:
        """The largest moment of all."""
        return max(self.peaks.values(), key=lambda moment: moment.total)


START = Place("start")
