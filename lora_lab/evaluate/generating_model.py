"""lm-eval's Hugging Face model whose greedy answers share the beginning of their prompts."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.adapters.prompts import virtual_tokens
from lora_lab.evaluate.checked_model import CheckedModel
from lora_lab.evaluate.greedy.decoder import GreedyDecoder
from lora_lab.evaluate.greedy.rules import why_not_greedy

Engine = Literal["tree", "stock"]


class GeneratingModel(CheckedModel):
    """CheckedModel with a greedy decoder of its own. What that does not do, lm-eval does, and `engine_facts` say why.

    Args:
        engine: `tree`, or `stock` for all of lm-eval's own.

    engine_facts: one entry per call of lm-eval's: kind of request, engine, why it is not ours, and what it did.

    Raises:
        EvaluationError: see CheckedModel.
        ValueError: an unknown engine.
    """

    def __init__(
        self,
        pretrained: nn.Module | str,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        engine: Engine = "tree",
        **settings: Any,
    ) -> None:
        if engine not in ("tree", "stock"):
            raise ValueError(f'engine: expected tree or stock, got "{engine}"')
        super().__init__(pretrained, tokenizer=tokenizer, **settings)
        self.engine = engine
        self.engine_facts: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {}  # of the call that goes on
        self._decoder: GreedyDecoder | None = None
        self._batches: Counter[str | None] = Counter()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The generated texts, task by task: requests of one task share a header more often than a length.

        What is kept of prompts lives as long as the requests of a task.
        """
        by_task: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_task.setdefault(str(request.task_name), []).append(index)
        texts: dict[int, str] = {}
        with self._call("generate_until"):
            self._batches = Counter()
            for indices in by_task.values():
                try:
                    own = super().generate_until([requests[index] for index in indices], disable_tqdm)
                finally:
                    self._decoder = None
                texts |= dict(zip(indices, own, strict=True))
            self._facts |= {"engine": "stock" if None not in self._batches else "greedy", "requests": len(requests)}
            if self.engine != "stock" and (reasons := {why: n for why, n in self._batches.items() if why is not None}):
                self._facts["why_stock"] = "; ".join(f"{why} ({n} batches)" for why, n in reasons.items())
        return [texts[index] for index in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        why, answer = self._why_not_greedy(max_length, settings), None
        if why is None:
            if self._decoder is None:
                self._decoder = GreedyDecoder(self.model, self.tokenizer)
            with self._autocast():
                answer = self._decoder.generate(context, settings["attention_mask"], max_length, stop)
            why = None if answer is not None else "the rows of a batch cannot share what they begin with"
        self._batches[why] += 1
        return super()._model_generate(context, max_length, stop, **settings) if answer is None else answer

    def _why_not_greedy(self, max_length: int, settings: dict[str, Any]) -> str | None:
        if self.engine == "stock":
            return "evaluation.engine=stock"
        if self.backend != "causal":
            return "it is not a causal language model"
        if self.think_end_token is not None:
            return "what it thinks is cut off"
        return why_not_greedy(self.model, self.tokenizer, settings, virtual_tokens(self.model) + max_length)

    @contextlib.contextmanager
    def _call(self, kind: str) -> Iterator[None]:
        """One call of lm-eval's: its facts are gathered and kept."""
        facts: dict[str, Any] = {"kind": kind}
        self._facts = facts
        try:
            yield
        finally:
            self.engine_facts.append(facts)
            self._facts = {}

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """What lm-eval runs forward passes in."""
        dtype = self.mixed_precision_dtype
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
