"""Timelines and predictions for tests: a step of a small network, counted by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lab.plan.prediction import Prediction
from lora_lab.plan.timeline import PARTS, START, Event, Place, Timeline

WEIGHT, ADAPTER, STATE, ACTIVATION, GRADIENT, BUFFER = 1000, 30, 60, 100, 30, 45


def step_of(layers: int, *, steps_in_layer: int = 1) -> Timeline:
    """Weights, adapter and state at the start; forward keeps an activation per layer, backward frees it for a gradient.

    In each backward layer a buffer comes and goes `steps_in_layer` times. The peak is in the first of them, on top of
    all activations; nothing else is alive then but what was there at the start and the head's activation.
    """
    events, parts = [], {}

    def born(part: str, size: int, place: Place) -> int:
        number = len(parts)
        parts[number] = part
        events.append(Event(number, size, place))
        return number

    for part, size in (("weights", WEIGHT), ("adapter", ADAPTER), ("optimizer_state", STATE)):
        born(part, size, START)
    kept = [born("activations", ACTIVATION, Place("forward", layer)) for layer in range(layers)]
    head = born("activations", 7, Place("forward", after=True))
    for layer in reversed(range(layers)):
        place = Place("backward", layer)
        for _ in range(steps_in_layer):
            buffer = born("temporary", BUFFER, place)
            events.append(Event(buffer, -BUFFER, place))
        born("gradients", GRADIENT, place)
        events.append(Event(kept[layer], -ACTIVATION, place))
    events.append(Event(head, -7, Place("backward")))
    clip = born("temporary", 5, Place("clip"))
    events.append(Event(clip, -5, Place("update")))
    # What nobody claimed is temporary, so it need not be in the mapping.
    return Timeline(tuple(events), {number: part for number, part in parts.items() if part != "temporary"})


def peak_of(layers: int) -> dict[str, int]:
    """The parts at the peak of `step_of`."""
    known = {"weights": WEIGHT, "adapter": ADAPTER, "optimizer_state": STATE}
    return {**dict.fromkeys(PARTS, 0), **known, "activations": layers * ACTIVATION + 7, "temporary": BUFFER}


def prediction_of_parts(parts: Mapping[str, int], **changes: Any) -> Prediction:
    """A prediction whose peak is the sum of its parts."""
    fields: dict[str, Any] = {
        "device_kind": "cpu",
        "style": "own",
        "trainable_parameters": 1_234,
        "total_parameters": 56_789,
        "peak_allocated_bytes": sum(parts.values()),
        "peak_reserved_bytes": None,
        "parts": {**dict.fromkeys(PARTS, 0), **parts},
        "place": "backward, layer 3",
        "paged_bytes": 0,
        "base_bytes": parts.get("weights", 0) + parts.get("quantization_constants", 0),
        "micro_batch_size": 2,
        "longest_row": 321,
        "rows": "the longest of 512 rows",
        "how": "traced in full",
        "notes": (),
    }
    return Prediction(**{**fields, **changes})
