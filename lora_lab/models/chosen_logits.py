"""Logits of chosen positions, and of no others.

The output embedding is the widest matrix product of a small model, and most positions' logits are never looked at. A
hook in front of it keeps only chosen hidden states; whatever the model does to logits afterwards (scale, soft cap, an
adapter on the head) still applies, because the model itself runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class ChosenPositions:
    """What `chosen_logits` yields: set `mask` before each call of the model.

    mask: [rows, length] bool, True where logits are wanted, in the length of what the model is called with. The call
    then returns logits [1, chosen, vocabulary] in row-major order.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def keep(self, _head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the output embedding: [rows, length, hidden] becomes [1, chosen, hidden].

        Raises:
            RuntimeError: the model was called without a choice.
        """
        if self.mask is None:
            raise RuntimeError("inside the block the model is called through the object that chooses positions")
        hidden: Tensor = inputs[0]
        row, place = self.mask.nonzero(as_tuple=True)
        # Virtual tokens of prompt-learning methods stand in front of the row; the row itself is the end.
        place = place + hidden.shape[1] - self.mask.shape[1]
        chosen = (row * hidden.shape[1] + place).to(hidden.device)
        return (hidden.flatten(0, 1).index_select(0, chosen).unsqueeze(0), *inputs[1:])


@contextmanager
def chosen_logits(model: nn.Module) -> Iterator[ChosenPositions]:
    """Within the block the model's logits are those of the positions that the yielded object chooses.

    `model` is a causal LM of transformers, or a PeftModel around one (the head itself may be adapted). Works under
    autograd and gradient checkpointing: the output embedding is outside the checkpointed layers.
    """
    chosen = ChosenPositions()
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(chosen.keep)
    try:
        yield chosen
    finally:
        handle.remove()
