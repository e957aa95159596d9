"""lm-eval's model `lora_lab`: lm-eval's own Hugging Face model, with every shared token computed once."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_lab.evaluate.checked_model import CheckedModel

Engine = Literal["tree", "stock"]


class LabModel(CheckedModel):
    """HFLM whose log-likelihoods come from a prefix tree; takes HFLM's own settings.

    engine: `tree`, or `stock` for lm-eval's own batches. chunk_tokens: tokens of one forward pass; None chooses.
    """

    def __init__(
        self,
        pretrained: nn.Module | str,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        engine: Engine = "tree",
        chunk_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, tokenizer=tokenizer, **settings)
        self.engine = engine
        self.chunk_tokens = chunk_tokens
