"""lm-eval's own Hugging Face model, which stops where lm-eval would score a NaN as a real answer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftType
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lora_lab.adapters.prompts import check_room, virtual_tokens
from lora_lab.errors import EvaluationError, Problem
from lora_lab.models.generate import generation_inputs


class CheckedModel(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """HFLM around a model object: same requests, same batches, same numbers, each checked to be finite.

    truncated_requests: how many were longer than the model's context and lost their beginning.

    A tokenizer object is copied, because HFLM gives a tokenizer without a pad token one. Virtual tokens are no part of
    what is scored, but take their share of the context.

    Args:
        pretrained: a model object with its adapter, or what HFLM loads: a folder or the name of a hub repository.
        tokenizer: as HFLM takes it; an object where the model is one.
        settings: HFLM's own.

    Raises:
        InputError: virtual tokens leave no room for a row.
        EvaluationError: a log-likelihood is NaN or infinite, or a logit is while generating; names task and document.
    """

    def __init__(
        self,
        pretrained: nn.Module | str,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        **settings: Any,
    ) -> None:
        self.truncated_requests = 0
        if not isinstance(tokenizer, str):
            tokenizer = copy.deepcopy(tokenizer)
        if not isinstance(pretrained, str):
            settings = {"backend": "causal", **settings}
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **settings)
        check_room(self.model, virtual_tokens(self.model), 1)

    @property
    def max_length(self) -> int:
        """The longest row in tokens: the model's context without the virtual tokens."""
        return int(super().max_length) - virtual_tokens(self.model)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """[(log-likelihood in nats, whether greedy decoding gives the continuation)], one per request."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        check_finite(requests, [value for value, _ in answers])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text."""
        values: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        check_finite(requests, values)
        return values

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The generated texts. A NaN would be read as some token by argmax, so logits are watched on the way."""
        tasks = sorted({str(request.task_name) for request in requests})
        watch = self.model.get_output_embeddings().register_forward_hook(_refuse_non_finite(tasks))
        try:
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        finally:
            watch.remove()
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._count_truncated(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)  # type: ignore[no-any-return]

    def _count_truncated(self, requests: Sequence[Any]) -> None:
        limit = self.max_length + 1
        self.truncated_requests += sum(len(context) + len(target) > limit for _, context, target in requests)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of the row's own tokens, [rows, length, vocabulary]."""
        if not virtual_tokens(self.model):
            return super()._model_call(inps, attn_mask, labels)  # type: ignore[no-any-return]
        with torch.no_grad():
            # Models that do not know `logits_to_keep` compute the others too.
            logits: Tensor = self.model(input_ids=inps, logits_to_keep=inps.shape[1]).logits
        return logits[:, -inps.shape[1] :]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """As HFLM does it; what is cut is counted, which of a padded batch shows before the cut only."""
        ids, mask = super().tok_batch_encode(strings, padding_side=padding_side, **settings)
        if left_truncate_len is None:
            return ids, mask
        self.truncated_requests += int((mask.sum(dim=1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        if not virtual_tokens(self.model):
            return super()._model_generate(context, max_length, stop, **settings)  # type: ignore[no-any-return]
        mask = settings.pop("attention_mask")
        if bool((mask == 0).any()) and self._padding_parts_window(max_length):
            return self._generate_alone(context, mask, max_length, stop, **settings)
        with generation_inputs(self.model, context, mask) as inputs:
            return super()._model_generate(  # type: ignore[no-any-return]
                inputs.pop("input_ids"),
                None,
                stop,
                max_new_tokens=max_length - context.shape[1],
                **inputs,
                **settings,
            )

    def _padding_parts_window(self, max_length: int) -> bool:
        """Whether a window of attention, which counts padding too, could lose a prefix behind it."""
        window = getattr(self.model.config, "sliding_window", None)
        is_prefix = self.model.peft_type == PeftType.PREFIX_TUNING
        return is_prefix and window is not None and virtual_tokens(self.model) + max_length > window

    def _generate_alone(
        self, context: Tensor, mask: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        """Row by row, without padding; its place is kept."""
        rows = []
        for ids, real in zip(context, mask.bool(), strict=True):
            row = ids[real][None]
            settings["attention_mask"] = torch.ones_like(row)
            pads = len(ids) - row.shape[1]
            rows.append(torch.cat((ids[:pads], self._model_generate(row, max_length - pads, stop, **settings)[0])))
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)


def check_finite(requests: Sequence[Any], values: Sequence[float]) -> None:
    """Raises EvaluationError with the task and document of lm-eval's `requests` whose value is NaN or infinite."""
    problems: dict[tuple[str, int], Problem] = {}
    for request, value in zip(requests, values, strict=True):
        key = (str(request.task_name), int(request.doc_id))
        if not math.isfinite(value) and key not in problems:
            message = f"a log-likelihood is {value}, so there is no score"
            problems[key] = Problem(f"task {key[0]}, document {key[1]}", message)
    if problems:
        shown = list(problems.values())[:5]
        more = [Problem("", f"and {len(problems) - 5} more documents")] if len(problems) > 5 else []
        raise EvaluationError([*shown, *more])


def _refuse_non_finite(tasks: Sequence[str]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not bool(torch.isfinite(output).all()):
            raise EvaluationError(Problem(f"task {', '.join(tasks)}", "a logit is not finite while generating"))

    return hook
