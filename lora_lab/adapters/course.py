"""What a method does in the course of training beside gradients: losses of its own, and acts between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AuxiliaryLoss:
    """A loss beside the language model's: `value` (scalar, with graph) is logged, weight x value is trained on."""

    name: str
    value: Tensor
    weight: float


class Auxiliary(Protocol):
    """Losses of a method for each micro-batch. The calls of one micro-batch: `open`, the forward pass, `close`."""

    def open(self, attention_mask: Tensor, types: Sequence[str | None]) -> None:
        """Before the forward pass. attention_mask: [B, T], 1 for real tokens; types: of the B rows."""

    def close(self) -> list[AuxiliaryLoss]:
        """After the forward and before the backward pass: nothing that is computed again is listened to."""
        ...


@dataclass(frozen=True, slots=True)
class CourseState:
    """What a course has learnt in the steps so far, beside the weights: tensors, and JSON values."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Course(Protocol):
    """What happens to the model between optimizer steps; `step` counts finished steps, from 0."""

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Before the first micro-batch of a step."""

    def after_step(self, step: int) -> None:
        """After the update, while the gradients of the step are still there."""

    def state(self, step: int) -> CourseState:
        """After `step` steps; the tensors are the course's own."""
        ...

    def misfits(self, step: int, state: CourseState) -> list[str]:
        """Why this course could not have come to `state` in `step` steps; changes nothing."""
        ...

    def take_up(self, step: int, state: CourseState, optimizer: torch.optim.Optimizer) -> None:
        """Makes a course that has not begun what it was after `step` steps; `state` has no misfits."""
