"""Greedy answers to a batch of prompts, with what prompts share computed once and rows that have ended left out.

For a batch of `rows` rows, `length` columns and `new` tokens, lm-eval (through `generate` of transformers) computes
rows x (length + new) tokens, where `new` is what the slowest row takes. Here a row costs its own new tokens; of the
prompts' columns those that all rows share cost one row instead of `rows`, and nothing at all if the batch before has
them. Rows keep the layout of `generate`, padding on the left, so that windows of attention and positions are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftType
from torch import Tensor, nn
from transformers import DynamicCache

from lora_lab.adapters.prompts import virtual_tokens
from lora_lab.evaluate.greedy.row_cache import keep_rows, one_row, roomy_cache
from lora_lab.evaluate.greedy.stops import Stops

# Tokens that a pass of its own over a prefix, or taking one from the cache, must save. Such a pass reads all weights
# once: the time of some ten tokens on a CPU, of a few hundred on a GPU.
LEAST_SAVED = 256
# The part of the columns that the cache must hold where there is no padding. Attention is causal by a flag then, half
# the work; behind a cache it takes a mask, and at n of m columns (m - n) m products instead of m m / 2. From a third on
# it saves more in the other layers than it loses here, up to rows of a dozen times the hidden size; from a half always.
LEAST_PART = 1 / 3


class GreedyDecoder:
    """Greedy decoding of batch after batch. Keys and values of the longest prompt of a batch are kept for the next.

    One object serves one model as it is: another adapter, or changed weights, need another decoder.
    Which requests it may answer, `rules.why_not_greedy` says.

    model: a causal LM of transformers, or a PeftModel around one, in eval mode. tokenizer: lm-eval's.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._network = _Network(model)
        self._tokenizer = tokenizer
        self._ends = _end_ids(model)
        self._kept, self._cache = self._network.root()
        self._is_over = False

    @torch.no_grad()
    def generate(self, context: Tensor, mask: Tensor, max_length: int, stop: Sequence[str]) -> Tensor | None:
        """Context and new tokens, as `HFLM._model_generate` gives them.

        A row ends with an end-of-text token or where no further token could change the text that lm-eval takes of it;
        behind that is padding.

        Args:
            context: token ids [rows, length], padded on the left.
            mask: [rows, length], 0 on padding.
            max_length: of context and new tokens.
            stop: stop strings, the end-of-text token's among them.

        Returns:
            [rows, at most max_length], or None where lm-eval's own loop has to do it: a row without a token; a prefix
            of keys and values (prefix tuning) that rows of unequal length cannot share; a stop string that ends a row
            for lm-eval but not in the text it reads, because there the text depends on when the other rows end. After
            the last of these all further batches are lm-eval's, so that no more is computed twice.
        """
        if self._is_over or max_length <= context.shape[1] or not bool(mask.any(dim=1).all()):
            return None
        rows = [
            [*self._network.virtual_ids, *ids[real].tolist()] for ids, real in zip(context, mask.bool(), strict=True)
        ]
        with self._network.last_logits_only():
            started = self._start(rows)
            if started is None:
                return None
            new = self._continue(*started, max_length - context.shape[1], Stops(self._tokenizer, stop))
        if new is None:
            self._is_over, self._cache = True, None
            return None
        width = max(len(row) for row in new)
        pad = self._tokenizer.pad_token_id
        filled = [[*row, *[pad] * (width - len(row))] for row in new]
        return torch.cat((context, context.new_tensor(filled)), dim=1)

    def _start(self, rows: list[list[int]]) -> tuple[Tensor, Tensor, DynamicCache] | None:
        """Logits [rows, vocabulary] behind the prompts, their mask, and the cache that holds them."""
        length = max(map(len, rows))
        longest = next(index for index, row in enumerate(rows) if len(row) == length)
        columns = self._shared_columns(rows, rows[longest])
        if columns is None:
            return None
        self._extend(rows[longest][:columns])
        pads = [length - len(row) for row in rows]
        ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
        mask = torch.arange(length) >= torch.tensor(pads)[:, None]
        ids, mask = ids.to(self._network.device), mask.long().to(self._network.device)
        cache = roomy_cache(self._cache, pads, columns)
        logits = self._network(ids[:, columns:], mask, cache)
        self._kept, self._cache = rows[longest], one_row(cache, longest, length)
        return logits, mask, cache

    def _shared_columns(self, rows: Sequence[list[int]], longest: list[int]) -> int | None:
        """How many leading columns to take from a cache of the longest row. None: the cache cannot serve.

        A shorter row has padding first, so it takes fewer tokens from the cache and computes the others again, in
        columns that it would fill with padding otherwise. One token is left to every row, for its logits.
        """
        pads = [len(longest) - len(row) for row in rows]
        most = min(pad + min(_common(row, longest), len(row) - 1) for pad, row in zip(pads, rows, strict=True))
        there = min(most, _common(self._kept, longest))
        least = self._network.least_columns(max(pads))
        if (len(rows) - 1) * (most - there) >= LEAST_SAVED or there < least:
            there = most
        if there < least:
            return None
        pays = there * len(rows) >= LEAST_SAVED and (any(pads) or there >= LEAST_PART * len(longest))
        return there if pays or least else 0

    def _extend(self, prefix: list[int]) -> None:
        """Has the kept cache begin with `prefix`."""
        there = _common(self._kept, prefix)
        if there == len(prefix):
            return
        if self._cache is None or there == 0:
            self._cache = DynamicCache()
        else:
            self._cache.crop(there - len(self._kept))
        ids = torch.tensor([prefix[there:]], device=self._network.device)
        self._network(ids, ids.new_ones((1, len(prefix))), self._cache)
        self._kept = prefix

    def _continue(
        self, logits: Tensor, mask: Tensor, cache: DynamicCache, room: int, stops: Stops
    ) -> list[list[int]] | None:
        """The new tokens of every row, at most `room`."""
        new: list[list[int]] = [[] for _ in logits]
        active = list(range(len(new)))
        while True:
            chosen = logits.float().argmax(dim=-1)
            for row, token in zip(active, chosen.tolist(), strict=True):
                new[row].append(token)
            ended = [self._has_ended(new[row], stops) for row in active]
            if any(end is None for end in ended) and len(new) > 1:
                return None
            kept = [index for index, end in enumerate(ended) if end is False]
            if not kept or len(new[active[0]]) == room:
                return new
            if len(kept) < len(active):
                active = [active[index] for index in kept]
                chosen, mask = _select(kept, chosen, mask, cache)
            mask = torch.cat((mask, mask.new_ones((len(mask), 1))), dim=1)
            logits = self._network(chosen[:, None], mask, cache)

    def _has_ended(self, new: list[int], stops: Stops) -> bool | None:
        """None: for lm-eval it has, but more tokens could change the text that it reads."""
        if new[-1] in self._ends:
            return True
        if not stops.are_met(new):
            return False
        return True if stops.settle(new) else None


class _Network:
    """A model as the decoder calls it: virtual tokens are tokens with the ids -1, -2, ... in front of every row."""

    def __init__(self, model: Any) -> None:
        count = virtual_tokens(model)
        self._model = model.get_base_model() if count else model
        self._head: nn.Module = model.get_output_embeddings()
        self._prompted = model if count else None
        self._is_prefix = count > 0 and model.peft_type == PeftType.PREFIX_TUNING
        self._embeddings: Tensor | None = None
        if count and not self._is_prefix:
            with torch.no_grad():
                self._embeddings = model.get_prompt(batch_size=1)[0]
        self.virtual_ids = [-1 - index for index in range(count)]
        self.device = model.get_input_embeddings().weight.device

    @torch.no_grad()
    def root(self) -> tuple[list[int], DynamicCache | None]:
        """What is known before the first row: the keys and values of prefix tuning."""
        if not self._is_prefix or self._prompted is None:
            return [], None
        given = self._prompted.get_prompt(batch_size=1)
        return self.virtual_ids, one_row(given, 0, len(self.virtual_ids))

    def least_columns(self, most_padding: int) -> int:
        """The columns that must come from a cache: keys and values of prefix tuning cannot be computed from a token."""
        return most_padding + len(self.virtual_ids) if self._is_prefix else 0

    @contextmanager
    def last_logits_only(self) -> Iterator[None]:
        """Within the block the output embedding sees the last column only; works for models of any signature."""
        handle = self._head.register_forward_pre_hook(_last_column)
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [rows, vocabulary] behind the last of `ids` [rows, n]; mask [rows, cached columns + n]."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids}
        if self._embeddings is not None and bool((ids < 0).any()):
            inputs = {"inputs_embeds": self._embedded(ids, self._embeddings)}
        output = self._model(
            **inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    def _embedded(self, ids: Tensor, prompt: Tensor) -> Tensor:
        own: Tensor = self._model.get_input_embeddings()(ids.clamp(min=0))
        virtual = prompt.to(own.dtype)[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], virtual, own)


def _last_column(_head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0][:, -1:], *inputs[1:])


def _select(kept: Sequence[int], chosen: Tensor, mask: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Only the rows `kept`, without the columns that are padding in all of them."""
    rows = torch.tensor(kept, device=mask.device)
    mask = mask[rows]
    first = int(mask.argmax(dim=1).min())
    keep_rows(cache, rows, first)
    return chosen[rows], mask[:, first:]


def _end_ids(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))
