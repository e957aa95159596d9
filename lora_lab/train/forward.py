"""From micro-batches to losses: the two ways in which a model is called in training.

`Alone`: one model on padded rows, for every method. `Together`: any number of members on one trunk, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.data.batches import Batch, collate
from lora_lab.data.encode import Encoded
from lora_lab.models.loss_token_logits import LossTokenHead


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some examples of one member, by its name."""

    name: str
    examples: Sequence[Encoded]

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def loss_tokens(self) -> int:
        """Targets that carry loss."""
        return sum(example.loss_tokens for example in self.examples)

    @property
    def padded_tokens(self) -> int:
        """Tokens of the rows when all are as long as the longest."""
        return len(self.examples) * max(len(example.input_ids) for example in self.examples)


class Forward(Protocol):
    """Losses of micro-batches, with graph.

    computes_padding: whether tokens of padding are computed too. device: where the model is.
    """

    computes_padding: bool
    device: torch.device

    def __call__(self, work: Sequence[MicroBatch]) -> list[Tensor]:
        """Of each micro-batch (each of another member) the sum of its token losses, in nats; a scalar."""
        ...

    def logits(self, one: MicroBatch) -> Tensor:
        """Of the loss tokens of one micro-batch, [loss tokens, vocabulary]."""
        ...


class Alone:
    """One member: the model behind `head`, on padded rows."""

    computes_padding = True

    def __init__(self, head: LossTokenHead, *, pad_id: int, device: torch.device) -> None:
        self._head, self._pad_id, self.device = head, pad_id, device

    def __call__(self, work: Sequence[MicroBatch]) -> list[Tensor]:
        """See `Forward`; raises ValueError for more than one member."""
        (one,) = work
        batch = collate(one.examples, self._pad_id, self.device)
        return [token_losses(self._logits(batch), batch.input_ids[batch.loss_mask]).sum()]

    def logits(self, one: MicroBatch) -> Tensor:
        """See `Forward`."""
        return self._logits(collate(one.examples, self._pad_id, self.device))

    def _logits(self, batch: Batch) -> Tensor:
        return self._head(input_ids=batch.input_ids, attention_mask=batch.attention_mask, loss_mask=batch.loss_mask)


class Together:
    """Members that are seated on `trunk`, any number of them in one pass."""

    computes_padding = False

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.device: torch.device = trunk.model.device

    def __call__(self, work: Sequence[MicroBatch]) -> list[Tensor]:
        """See `Forward`."""
        logits, made = self.trunk({one.name: one.examples for one in work})
        losses = token_losses(logits, made.targets)
        return [losses[span.start : span.stop].sum() for span in (made.outputs[one.name] for one in work)]

    def logits(self, one: MicroBatch) -> Tensor:
        """See `Forward`."""
        return self.trunk({one.name: one.examples})[0]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (nats) of [n, vocabulary] against [n]; half-precision logits are raised to fp32 first."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return cross_entropy(logits, targets, reduction="none")
