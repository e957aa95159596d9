"""The model's own answer to a prompt, greedily: the same model gives the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor

# Their virtual tokens are embeddings in front of the row's own; those of a prefix live in the cache of keys and values.
_EMBEDDED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


@dataclass(frozen=True, slots=True)
class Generated:
    """`is_complete`: the model ended its turn itself, rather than at the limit of new tokens."""

    text: str
    is_complete: bool


def generate(
    model: Any, tokenizer: Any, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Generated:
    """The text that follows `prompt_ids` (token ids of one prompt, no padding), without special tokens.

    stop_ids: tokens that end it, see `data.encode.stop_ids`. Works with a plain transformers model and with PEFT on it;
    the model is left in the mode it was in.
    """
    ids = torch.tensor([list(prompt_ids)], dtype=torch.long, device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), generation_inputs(model, ids, torch.ones_like(ids)) as inputs:
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=list(stop_ids),
            )
    finally:
        model.train(was_training)
    new = output[0, ids.shape[1] :]
    is_complete = len(new) > 0 and int(new[-1]) in stop_ids
    return Generated(str(tokenizer.decode(new, skip_special_tokens=True)), is_complete)


@contextmanager
def generation_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Iterator[dict[str, Tensor]]:
    """What to give `model.generate` within the block, so that left-padded rows get what each would get alone.

    PEFT puts the embeddings of prompt tuning and p-tuning in front of the padding and then counts the padding as
    positions. Here they stand between padding and row, and PEFT is switched off within the block. Everything else is
    right as it is.

    Args:
        model: a causal LM of transformers, or a PeftModel around one.
        input_ids: [rows, length], left-padded.
        attention_mask: [rows, length], 0 on padding.

    Yields:
        input_ids as given (`generate` puts what is new behind them), attention_mask, and for embedded virtual tokens
        inputs_embeds; these two are longer by the virtual tokens, so the room is to be given as max_new_tokens.

    Raises:
        ValueError: padding that is not on the left.
    """
    if not _embeds_virtual_tokens(model):
        yield {"input_ids": input_ids, "attention_mask": attention_mask}
        return
    if bool((attention_mask.diff(dim=1) < 0).any()):
        raise ValueError("attention_mask: padding must be on the left")
    with torch.no_grad():
        prompt = model.get_prompt(batch_size=1)[0]
        embedded = model.get_input_embeddings()(input_ids)
    pads = (attention_mask.shape[1] - attention_mask.sum(dim=1)).tolist()
    prompt = prompt.to(embedded.dtype)
    rows = [torch.cat((row[:pad], prompt, row[pad:])) for row, pad in zip(embedded, pads, strict=True)]
    ones = attention_mask.new_ones((len(rows), len(prompt)))
    with model.disable_adapter():
        yield {
            "input_ids": input_ids,
            "inputs_embeds": torch.stack(rows),
            "attention_mask": torch.cat((attention_mask, ones), dim=1),
        }


def _embeds_virtual_tokens(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.peft_type in _EMBEDDED and model.has_active_enabled_adapter
