"""Dropout of the adapter's input whose mask is a pure function of the run, never of global random state.

The mask follows from (seed, step, micro-batch, module): a layer that is computed again under non-reentrant gradient
checkpointing draws the same mask, a resumed run goes on with the masks it would have had, and runs trained side by side
do not disturb each other. On another kind of device the same seed draws another mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(slots=True)
class DropoutClock:
    """Where training stands; shared by all dropouts of an adapter and moved by the training loop.

    It must not move between the forward pass of a micro-batch and its backward pass.
    """

    seed: int
    step: int
    micro_batch: int


class SeededDropout(nn.Module):
    """Zeroes each element with probability p in training mode and multiplies the rest by 1 / (1 - p).

    A module that is called twice in one micro-batch repeats its mask.
    """

    def __init__(self, p: float, *, clock: DropoutClock, index: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"expected 0 <= p < 1, got {p}")
        self.p = p
        self.clock = clock
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of any shape; the same shape and dtype come back."""
        if not self.training or self.p == 0:
            return x
        return x.masked_fill(self.dropped(x.shape, x.device), 0) * self.keep_scale

    @property
    def keep_scale(self) -> float:
        """What the elements that are kept are multiplied by."""
        return 1 / (1 - self.p)

    def dropped(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """The mask of an input of this shape at the clock's time: bool, True where it is zeroed."""
        generator = torch.Generator(device=device).manual_seed(self._mask_seed())
        return torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float32) < self.p

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        return f"p={self.p}, index={self.index}"

    def _mask_seed(self) -> int:
        clock = self.clock
        content = f"dropout {clock.seed} {clock.step} {clock.micro_batch} {self.index}"
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1
