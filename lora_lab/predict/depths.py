"""From two shallow models to a deep one: where decoder layers are alike, memory is affine in their number.

The largest moment of a step may lie in the head, in the last layer or in the first, and which of them wins changes with
depth. So every place is extrapolated by itself: of layers the first two and the last two, since those between them lie
on a line. What CUDA's allocator hands out and reserves depends on the order of events, which are made for the whole
depth (`repeated_layers`). Tests compare with traces in full: both are exact.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.memory.allocator import AllocatorPeaks, allocator_peaks
from lora_lab.plan.devices import WORKSPACE_BYTES
from lora_lab.plan.prediction import DeviceKind, LongestRows, Style
from lora_lab.plan.timeline import PARTS, START, Event, Moment, Place
from lora_lab.predict.repeated_layers import deepened
from lora_lab.predict.styles.litgpt import litgpt_step
from lora_lab.predict.traced_step import TracedStep, traced_step
from lora_lab.schema.trial import Trial
from lora_lab.schema.weight_methods import Freeze, Lisa

_SHALLOW, _DEEPER = 3, 4
# From here on two shallow traces cost less than one in full.
_WORTH_IT = 9


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one step of a model takes. reserved_bytes: by the simulated allocator; None where that is not asked for."""

    peak: Moment
    trainable_parameters: int
    total_parameters: int
    base_bytes: int
    paged_bytes: int
    reserved_bytes: int | None
    rows: str
    how: str


def estimate(
    trial: Trial, rows: LongestRows, config: Any, *, device_kind: DeviceKind, style: Style = "own"
) -> Estimate:
    """Traces in full, or from two depths where that is exact; raises as `traced_step` and `litgpt_step` do."""
    if style in ("litgpt", "litgpt_first"):
        step = litgpt_step(trial, rows, device_kind=device_kind, first=style == "litgpt_first")
        return _of(step, device_kind, how="in full: lit-gpt's own model")
    labelled = style == "hf"
    depth = int(config.num_hidden_layers)
    why_full = _why_in_full(trial, config)
    if why_full is not None:
        # A CUDA device tells the largest peak of all periods, a probe that of the first. The draws that take most are
        # of the last layers (gradients are there first) or those before the last (which then keeps least).
        over_periods = isinstance(trial.method, Lisa) and device_kind == "cuda"
        steps = [
            traced_step(trial, rows, config, device_kind=device_kind, labelled=labelled, drawn_below=top)
            for top in ((depth, depth - 1) if over_periods else (None,))
        ]
        most = max(steps, key=lambda step: step.timeline.peak.total)
        return _of(most, device_kind, how=f"in full: {why_full}")
    low, high = (
        traced_step(trial, rows, _with_layers(config, layers), device_kind=device_kind, labelled=labelled)
        for layers in (_SHALLOW, _DEEPER)
    )
    places_low, places_high = _by_place(low, _SHALLOW), _by_place(high, _DEEPER)
    if places_low.keys() != places_high.keys():
        step = traced_step(trial, rows, config, device_kind=device_kind, labelled=labelled)
        return _of(step, device_kind, how="in full: its places differ with depth")
    moments = [_line(places_low[place], moment, depth) for place, moment in places_high.items()]
    peak, reserved = max(moments, key=lambda moment: moment.total), None
    if device_kind == "cuda":
        handed_out = _handed_out(low, high, depth, peak.total)
        if handed_out is None:
            step = traced_step(trial, rows, config, device_kind=device_kind, labelled=labelled)
            return _of(step, device_kind, how="in full: its layers differ in what they leave to each other")
        peak, reserved = _with_allocator(peak, handed_out.allocated - peak.total), handed_out.reserved
    return Estimate(
        peak=peak,
        trainable_parameters=_extended(low.counts.trainable, high.counts.trainable, depth),
        total_parameters=_extended(low.counts.total, high.counts.total, depth),
        base_bytes=_extended(low.base_bytes, high.base_bytes, depth),
        paged_bytes=_extended(low.paged_bytes, high.paged_bytes, depth),
        reserved_bytes=reserved,
        rows=high.rows,
        how=f"from {_SHALLOW} and {_DEEPER} of {depth} layers",
    )


def _why_in_full(trial: Trial, config: Any) -> str | None:
    """Why layers may not be alike, or need not be extrapolated."""
    depth, method = int(config.num_hidden_layers), trial.method
    if depth < _WORTH_IT:
        return f"{depth} layers"
    if trial.training.gradient_checkpointing not in ("off", "every_layer"):
        return "segments of several layers"
    if isinstance(method, Lisa | Freeze):
        return f"{method.kind} trains some layers"
    if any(isinstance(value, tuple) and len(value) > 1 for value in vars(method).values()):
        return f"{method.kind} with settings by layer"
    if trial.target.modules:
        return "modules named one by one"
    if any(isinstance(value, list) and len(value) == depth and len(set(value)) > 1 for value in vars(config).values()):
        return f"layers of {config.model_type} differ"
    return None


def _with_layers(config: Any, layers: int) -> Any:
    changed = copy.deepcopy(config)
    depth = int(config.num_hidden_layers)
    changed.num_hidden_layers = layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(changed, name, value[:layers])
    return changed


def _of(step: TracedStep, device_kind: DeviceKind, *, how: str) -> Estimate:
    peak, reserved = step.timeline.peak, None
    if device_kind == "cuda":
        handed_out = allocator_peaks(with_workspaces(step.timeline.events))
        peak = _with_allocator(peak, handed_out.allocated - peak.total)
        reserved = handed_out.reserved
    return Estimate(
        peak=peak,
        trainable_parameters=step.counts.trainable,
        total_parameters=step.counts.total,
        base_bytes=step.base_bytes,
        paged_bytes=step.paged_bytes,
        reserved_bytes=reserved,
        rows=step.rows,
        how=how,
    )


def _handed_out(low: TracedStep, high: TracedStep, depth: int, peak: int) -> AllocatorPeaks | None:
    """What the allocator hands out over the events of a model of this depth; None where these cannot be made.

    peak: of tensors, as the made events must have it too.
    """
    try:
        events = deepened(low.timeline.events, high.timeline.events, depth)
        if max(itertools.accumulate(event.change for event in events)) != peak:
            return None
        return allocator_peaks(with_workspaces(events))
    except ValueError:
        return None


def _by_place(step: TracedStep, depth: int) -> dict[Place, Moment]:
    """The places that are extrapolated, under names that do not depend on depth: layers from the end are negative."""
    found: dict[Place, Moment] = {}
    for place, moment in step.timeline.peaks.items():
        if place == START:
            continue
        if place.layer is None:
            found[place] = moment
            continue
        if place.layer <= 1:
            found[place] = moment
        if place.layer >= depth - 2:
            found[place._replace(layer=place.layer - depth)] = moment
    return found


def _line(low: Moment, high: Moment, depth: int) -> Moment:
    place = high.place
    if place.layer is not None and place.layer > 1:
        place = place._replace(layer=place.layer + depth - _DEEPER)
    return Moment(place, {part: _extended(low.parts[part], high.parts[part], depth) for part in PARTS})


def with_workspaces(events: Sequence[Event]) -> Iterator[Event]:
    """The events of a step on CUDA, with cuBLAS's workspaces: of the thread that goes forward, and of autograd's."""
    for storage in (-1, -2):
        yield Event(storage, WORKSPACE_BYTES, START)
    yield from events


def _with_allocator(peak: Moment, size: int) -> Moment:
    return Moment(peak.place, {**peak.parts, "allocator": size})


def _extended(low: int, high: int, depth: int) -> int:
    return low + (high - low) * (depth - _SHALLOW) // (_DEEPER - _SHALLOW)
