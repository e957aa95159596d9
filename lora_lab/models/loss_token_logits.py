"""Logits of the tokens that count, and of no others.

The output embedding is the widest matrix product of a small model, and a prompt token's logits are never looked at. A
hook in front of the output embedding keeps only the hidden states that predict a loss token; whatever the model does to
logits afterwards (scale, soft cap, an adapter on the head) still applies, because the model itself runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LossTokenHead:
    """What `loss_token_logits` yields: a forward pass that ends in the logits of the loss tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._chosen: Tensor | None = None

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
        self._chosen = torch.zeros_like(loss_mask)
        self._chosen[:, :-1] = loss_mask[:, 1:]
        try:
            output = self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            self._chosen = None
        logits: Tensor = output.logits
        return logits.squeeze(0)

    def keep_chosen(self, _head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the output embedding: [rows, length, hidden] becomes [1, loss tokens, hidden]."""
        if self._chosen is None:
            raise RuntimeError("inside loss_token_logits the model is called through the object it yields")
        hidden: Tensor = inputs[0]
        # Virtual tokens of prompt-learning methods stand in front of the row; the row itself is the end.
        own = hidden[:, hidden.shape[1] - self._chosen.shape[1] :]
        return (own[self._chosen.to(hidden.device)].unsqueeze(0), *inputs[1:])


@contextmanager
def loss_token_logits(model: nn.Module) -> Iterator[LossTokenHead]:
    """Within the block, calls of the yielded object return logits of loss tokens only.

    `model` is a causal LM of transformers, or a PeftModel around one (the head itself may be adapted). Works under
    autograd and gradient checkpointing: the output embedding is outside the checkpointed layers.
    """
    embedding: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head = LossTokenHead(model)
    handle = embedding.register_forward_pre_hook(head.keep_chosen)
    try:
        yield head
    finally:
        handle.remove()


def _check(attention_mask: Tensor, loss_mask: Tensor) -> None:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask: expected bool, got {loss_mask.dtype}")
    if bool(loss_mask[:, 0].any()):
        raise ValueError("loss_mask: the first token of a row has nothing in front of it that could predict it")
    if bool((loss_mask & (attention_mask == 0)).any()):
        raise ValueError("loss_mask: a padding token cannot be a loss token")
