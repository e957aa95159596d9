"""Logits of the tokens that count in the loss, and of no others: a prompt token's are never looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lab.models.chosen_logits import ChosenPositions, chosen_logits


class LossTokenHead:
    """What `loss_token_logits` yields: a forward pass that ends in the logits of the loss tokens."""

    def __init__(self, model: nn.Module, chosen: ChosenPositions) -> None:
        self._model = model
        self._chosen = chosen

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Tensor:
        """Logits that predict each loss token.

        Args:
            input_ids: [rows, length], right-padded.
            attention_mask: [rows, length], 0 on padding.
            loss_mask: [rows, length] bool, True on the tokens to predict.

        Returns:
            [loss tokens, vocabulary]; entry j predicts the j-th True of `loss_mask` in row-major order, from the hidden
            state one position before it.

        Raises:
            ValueError: a loss token is first in its row (nothing predicts it) or is padding.
        """
        _check(attention_mask, loss_mask)
        predicting = torch.zeros_like(loss_mask)
        predicting[:, :-1] = loss_mask[:, 1:]
        self._chosen.mask = predicting
        try:
            output = self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            self._chosen.mask = None
        logits: Tensor = output.logits
        return logits.squeeze(0)


@contextmanager
def loss_token_logits(model: nn.Module) -> Iterator[LossTokenHead]:
    """Within the block, calls of the yielded object return logits of loss tokens only.

    `model` is a causal LM of transformers, or a PeftModel around one (the head itself may be adapted). Works under
    autograd and gradient checkpointing: the output embedding is outside the checkpointed layers.
    """
    with chosen_logits(model) as chosen:
        yield LossTokenHead(model, chosen)


def _check(attention_mask: Tensor, loss_mask: Tensor) -> None:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask: expected bool, got {loss_mask.dtype}")
    if bool(loss_mask[:, 0].any()):
        raise ValueError("loss_mask: the first token of a row has nothing in front of it that could predict it")
    if bool((loss_mask & (attention_mask == 0)).any()):
        raise ValueError("loss_mask: a padding token cannot be a loss token")
