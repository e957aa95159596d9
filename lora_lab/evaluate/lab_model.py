"""lm-eval's model `lora_lab`: lm-eval's own Hugging Face model, with every shared token computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.adapters.prompts import virtual_tokens
from lora_lab.evaluate.checked_model import CheckedModel
from lora_lab.evaluate.generation import GreedyDecoder
from lora_lab.evaluate.greedy_rules import why_not_greedy

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
        self._decoder: GreedyDecoder | None = None

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The generated texts; what was kept of prompts lives as long as the call."""
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self._decoder = None

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        answer = self._greedy(context, max_length, stop, settings)
        return super()._model_generate(context, max_length, stop, **settings) if answer is None else answer

    def _greedy(self, context: Tensor, max_length: int, stop: list[str], settings: dict[str, Any]) -> Tensor | None:
        if self.engine == "stock" or self.backend != "causal" or self.think_end_token is not None:
            return None
        if why_not_greedy(self.model, self.tokenizer, settings, virtual_tokens(self.model) + max_length) is not None:
            return None
        if self._decoder is None:
            self._decoder = GreedyDecoder(self.model, self.tokenizer)
        is_mixed = self.mixed_precision_dtype is not None
        with torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype, enabled=is_mixed):
            return self._decoder.generate(context, settings["attention_mask"], max_length, stop)
