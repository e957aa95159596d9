"""Whether a run fits on a device, how much larger or smaller it may be, and what to change where it does not.

Everything is asked of a `predict` that is handed in. Each answer takes about a second, so few questions are asked.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lora_lab.plan.cohorts import why_not_fused
from lora_lab.plan.devices import WORKSPACE_BYTES, DeviceMemory, workspace_bytes
from lora_lab.plan.prediction import LongestRows, Prediction
from lora_lab.schema.adaptation import Quantization
from lora_lab.schema.combinations import combination_problems
from lora_lab.schema.trial import Trial

Predict = Callable[[Trial, LongestRows], Prediction]

# What quantization=nf4 stands for on the command line (conf/quantization/nf4.yaml).
NF4 = Quantization(kind="nf4", double_quantization=False)


@dataclass(frozen=True, slots=True)
class Fit:
    """A run on a device.

    needed_bytes: of the device: what the allocator reserves (CUDA) or what is alive (CPU), and the context.
    headroom_bytes: what is left of the device; negative where it does not fit. largest_micro_batch: the largest divisor
    of training.batch_size with which it fits; None where it fits with none. side_by_side: how many such runs fit on the
    device with one loaded base between them; 1 at most where the run cannot share its base (`cohorts.why_not_fused`).
    """

    device: DeviceMemory
    fits: bool
    needed_bytes: int
    headroom_bytes: int
    largest_micro_batch: int | None
    side_by_side: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Overrides with which a run fits. peak_bytes: what it then needs of the device, as `Fit.needed_bytes`."""

    overrides: tuple[str, ...]
    peak_bytes: int


def fit_of(trial: Trial, rows: LongestRows, prediction: Prediction, device: DeviceMemory, predict: Predict) -> Fit:
    """What `prediction`, which is that of `trial` with `rows`, means on a device.

    `predict` is asked about other micro-batch sizes only; what it raises is passed on.
    """
    needed = needed_bytes(prediction, device)
    sizes = _Needs(trial, rows, device, predict, known={trial.training.micro_batch_size: needed})
    return Fit(
        device=device,
        fits=needed <= device.total_bytes,
        needed_bytes=needed,
        headroom_bytes=device.total_bytes - needed,
        largest_micro_batch=sizes.largest(),
        side_by_side=_side_by_side(trial, prediction, device),
    )


def needed_bytes(prediction: Prediction, device: DeviceMemory) -> int:
    """What a run needs of a device: what is reserved, or without an allocator what is alive, and the context."""
    peak = prediction.peak_reserved_bytes
    if peak is None:
        return prediction.peak_allocated_bytes + device.context_bytes
    # A prediction holds two workspaces of the usual size; some cards are given larger ones.
    return peak + 2 * (workspace_bytes(device) - WORKSPACE_BYTES) + device.context_bytes


def closest_that_fit(trial: Trial, rows: LongestRows, device: DeviceMemory, predict: Predict) -> list[Suggestion]:
    """At most three ways to make a run fit that does not, the mildest first; empty where none that was tried fits.

    Tried are a smaller micro-batch (the largest that fits), gradient checkpointing of every layer where it is off, and
    an nf4 base where it is not quantized and an adapter is trained; then two of them together (the micro-batch is then
    1), then all. What the schema's rules forbid is not tried, nor what adds to something that is enough by itself.

    Raises:
        Whatever `predict` does.
    """
    found: list[Suggestion] = []
    enough: list[frozenset[str]] = []
    changes = _changes(trial)
    for names in _combinations(list(changes)):
        if any(done <= names for done in enough):
            continue
        if names == {_MICRO_BATCH}:
            suggestion = _smaller_micro_batch(trial, rows, device, predict)
        else:
            chosen = [changes[name] for name in changes if name in names]
            suggestion = _suggestion(trial, chosen, rows, device, predict)
        if suggestion is not None:
            found.append(suggestion)
            enough.append(names)
    return found


@dataclass(frozen=True, slots=True)
class _Change:
    """A value of a trial's section (`key` None: the section itself) and the override that sets it."""

    section: str
    key: str | None
    value: Any
    override: str


_MICRO_BATCH = "micro_batch"


def _changes(trial: Trial) -> dict[str, _Change]:
    """Those that can make a trial smaller, mildest first."""
    changes = {}
    if trial.training.micro_batch_size > 1:
        changes[_MICRO_BATCH] = _micro_batch(1)
    if trial.training.gradient_checkpointing == "off":
        override = "training.gradient_checkpointing=every_layer"
        changes["checkpointing"] = _Change("training", "gradient_checkpointing", "every_layer", override)
    if trial.quantization.kind == "none" and trial.method.has_adapter:
        changes["nf4"] = _Change("quantization", None, NF4, "quantization=nf4")
    return changes


def _micro_batch(size: int) -> _Change:
    return _Change("training", "micro_batch_size", size, f"training.micro_batch_size={size}")


def _combinations(names: list[str]) -> Iterator[frozenset[str]]:
    for size in range(1, len(names) + 1):
        yield from map(frozenset, itertools.combinations(names, size))


def _changed(trial: Trial, change: _Change) -> Trial:
    value = change.value
    if change.key is not None:
        value = getattr(trial, change.section).model_copy(update={change.key: value})
    return trial.model_copy(update={change.section: value})


def _suggestion(
    trial: Trial, changes: list[_Change], rows: LongestRows, device: DeviceMemory, predict: Predict
) -> Suggestion | None:
    for change in changes:
        trial = _changed(trial, change)
    if combination_problems(trial):
        return None
    needed = needed_bytes(predict(trial, rows), device)
    if needed > device.total_bytes:
        return None
    return Suggestion(tuple(change.override for change in changes), needed)


def _smaller_micro_batch(trial: Trial, rows: LongestRows, device: DeviceMemory, predict: Predict) -> Suggestion | None:
    needs = _Needs(trial, rows, device, predict)
    # As large as all rows is as large as it was, which was too large.
    below = min(trial.training.micro_batch_size, len(rows.lengths))
    size = needs.largest_that_fits(below)
    return None if size is None else Suggestion((_micro_batch(size).override,), needs.of(size))


class _Needs:
    """What a trial needs with other micro-batch sizes. Each is asked about once; `known` need not be asked about."""

    def __init__(
        self,
        trial: Trial,
        rows: LongestRows,
        device: DeviceMemory,
        predict: Predict,
        known: dict[int, int] | None = None,
    ) -> None:
        self._trial, self._rows, self._device, self._predict = trial, rows, device, predict
        self._batch = trial.training.batch_size
        self._all_rows = min(self._batch, len(rows.lengths))
        self._known = {self._same_as(size): need for size, need in (known or {}).items()}

    def of(self, size: int) -> int:
        """Bytes."""
        size = self._same_as(size)
        if size not in self._known:
            changed = _changed(self._trial, _micro_batch(size))
            self._known[size] = needed_bytes(self._predict(changed, self._rows), self._device)
        return self._known[size]

    def largest(self) -> int | None:
        """The largest divisor of the batch size that fits.

        The whole batch is asked about first, and not as one of the others: a step of one micro-batch keeps no gradients
        while it goes forward, so that it may need less than a step of two.
        """
        return self._batch if self._fits(self._batch) else self.largest_that_fits(self._all_rows)

    def largest_that_fits(self, below: int) -> int | None:
        """The largest divisor of the batch size that is smaller than `below` and fits: what is needed grows with it."""
        sizes = [size for size in range(1, below) if self._batch % size == 0]
        fitting = bisect.bisect_left(sizes, True, key=lambda size: not self._fits(size))
        return sizes[fitting - 1] if fitting else None

    def _fits(self, size: int) -> bool:
        return self.of(size) <= self._device.total_bytes

    def _same_as(self, size: int) -> int:
        """A micro-batch that all rows fit into needs what the whole batch does."""
        return self._batch if size >= self._all_rows else size


def _side_by_side(trial: Trial, prediction: Prediction, device: DeviceMemory) -> int:
    needed = needed_bytes(prediction, device)
    if why_not_fused(trial) is not None:
        return int(needed <= device.total_bytes)
    base = prediction.base_bytes + device.context_bytes
    return max(0, (device.total_bytes - base) // (needed - base))
