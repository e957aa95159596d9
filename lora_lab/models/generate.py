"""The model's own answer to a prompt, greedily: the same model gives the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


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
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
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
