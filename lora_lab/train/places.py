"""Where a training step is, for a counter of its memory: which phase, which decoder layer, there and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lora_lab.memory.live_bytes import LiveBytes
from lora_lab.plan.timeline import Place
from lora_lab.train.forward import Forward, MicroBatch


class WatchedForward:
    """A forward that says where the step is, and that what is alive at its end is kept for the way back."""

    def __init__(self, forward: Forward, counter: LiveBytes) -> None:
        self._forward, self._counter = forward, counter
        self.computes_padding, self.device = forward.computes_padding, forward.device

    def __call__(self, work: Sequence[MicroBatch]) -> list[Tensor]:
        """See `Forward`."""
        self._counter.place = Place("forward")
        losses = self._forward(work)
        self._counter.claim_live("activations")
        self._counter.place = Place("backward")
        return losses

    def logits(self, one: MicroBatch) -> Tensor:
        """See `Forward`."""
        self._counter.place = Place("curvature")
        return self._forward.logits(one)


@contextlib.contextmanager
def placed(layers: Sequence[nn.Module], counter: LiveBytes) -> Iterator[None]:
    """Within the block the counter hears which of a network's decoder layers is computed."""
    marks = _Marks(len(layers), counter)
    handles: list[Any] = []
    for number, layer in enumerate(layers):
        handles += [
            layer.register_forward_pre_hook(lambda _, __, index=number: marks.enter(index)),
            layer.register_forward_hook(lambda _, __, output, index=number: marks.leave(index, output)),
        ]
    try:
        yield
    finally:
        for handle in [*handles, *marks.handles]:
            handle.remove()


class _Marks:
    def __init__(self, depth: int, counter: LiveBytes) -> None:
        self._depth, self._counter = depth, counter
        self.handles: list[Any] = []

    def enter(self, index: int) -> None:
        if self._counter.place.phase == "forward":  # not where a layer is computed once more on the way back
            self._counter.place = Place("forward", index)

    def leave(self, index: int, output: Any) -> None:
        if self._counter.place.phase != "forward":
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.grad_fn is not None:
            self.handles.append(hidden.grad_fn.register_prehook(lambda _: self._enter_back(index)))
        if index == self._depth - 1:
            self._counter.place = Place("forward", after=True)

    def _enter_back(self, index: int) -> None:
        if self._counter.place.phase == "backward":
            self._counter.place = Place("backward", index)
