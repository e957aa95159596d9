"""The step of transformers' Trainer: the model is called with labels on padded rows, and computes its own loss.

Logits are made for every token, padding too, and raised to float32 for the loss, which is what our own step leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lab.data.batches import collate
from lora_lab.train.forward import MicroBatch

# What transformers' loss passes over.
_NO_TARGET = -100


class LabelledForward:
    """A `train.forward.Forward`: losses of one member as the model itself computes them."""

    computes_padding = True

    def __init__(self, model: Any, *, pad_id: int, device: torch.device) -> None:
        self._model, self._pad_id, self.device = model, pad_id, device

    def __call__(self, work: Sequence[MicroBatch]) -> list[Tensor]:
        """See `Forward`; raises ValueError for more than one member."""
        (one,) = work
        batch = collate(one.examples, self._pad_id, self.device)
        labels = batch.input_ids.masked_fill(~batch.loss_mask, _NO_TARGET)
        output = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
        return [output.loss * one.loss_tokens]

    def logits(self, one: MicroBatch) -> Tensor:
        """See `Forward`."""
        batch = collate(one.examples, self._pad_id, self.device)
        logits: Tensor = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[:, :-1][batch.loss_mask[:, 1:]]
