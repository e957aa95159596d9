"""One pass of a plan through a model: logits of the nodes that are asked for.

The tree mask: token q may attend to token k if k is q itself or an ancestor, which in a depth-first tree is
k <= q < ends[k]. It is additive, in the model's dtype: eager attention would add a boolean one as 0 and 1.

Attention is the model's own. On a CPU it takes 12 % of a pass of TruthfulQA through SmolLM2-135M (rows of 192 nodes
behind 172 kept tokens); FlexAttention with a block mask took 14 % less for it than SDPA with this mask, after 14 s of
compiling per shape, so it is not used. On a GPU neither was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from lora_lab.adapters.prompts import virtual_tokens
from lora_lab.evaluate.tree.passes import Pass
from lora_lab.evaluate.tree.prefix_cache import PrefixCache
from lora_lab.evaluate.tree.token_tree import Nodes, TokenTree
from lora_lab.models.chosen_logits import ChosenPositions, chosen_logits


class TreeForward:
    """Runs passes in the order of their plan on a causal LM of transformers or a PeftModel around one.

    Virtual tokens are the root of every row: a prompt's embeddings are read first, a prefix's keys and values are
    taken as they are, and all positions are shifted by their number.
    """

    def __init__(self, model: nn.Module, chosen: ChosenPositions, tree: TokenTree) -> None:
        self._chosen, self._tree = chosen, tree
        self._network = _reads_tokens(model)
        self._device: torch.device = model.device  # type: ignore[assignment]
        self._cache = _virtual_prefix(model, self._network, chosen)
        self._virtual = self._cache.length

    def __call__(self, one: Pass, wanted: Nodes) -> tuple[Tensor, Nodes]:
        """Logits [wanted nodes, vocabulary], and the nodes in the order in which they stand there: row by row.

        wanted: nodes in ascending order, each of them in a row of the pass.
        """
        ids, places = _padded(one.rows), _first_places(one.rows, wanted)
        nodes = np.maximum(ids, 0)
        inputs = {
            "input_ids": self._tensor(np.where(ids < 0, 0, self._tree.tokens[nodes])),
            "position_ids": self._tensor(np.where(ids < 0, 0, self._tree.depths[nodes]) + self._virtual),
        }
        self._cache.cut(self._virtual + one.prefix)
        if one.causal and not self._cache.length:
            # Padding follows the row. Positions that start again would be taken for packed sequences.
            inputs["position_ids"] = torch.arange(ids.shape[1], device=self._device)[None].expand(len(ids), -1)
        else:
            inputs["attention_mask"] = self._mask(ids)
        chosen = np.zeros(ids.shape, dtype=bool)
        chosen.flat[places] = True
        if not len(wanted):
            chosen[0, 0] = True  # kernels for quantized heads refuse nothing to do
        logits = self._run(self._tensor(chosen), inputs, keep=one.keep)[0]
        return (logits, wanted[np.argsort(places)]) if len(wanted) else (logits[:0], wanted)

    def _run(self, chosen: Tensor, inputs: dict[str, Tensor], *, keep: bool) -> Tensor:
        self._chosen.mask = chosen
        try:
            if keep:
                with self._cache.keep():
                    return self._logits(inputs, self._cache)
            return self._logits(inputs, self._cache if self._cache.length else None)
        finally:
            self._chosen.mask = None

    def _logits(self, inputs: dict[str, Tensor], cache: PrefixCache | None) -> Tensor:
        logits: Tensor = self._network(**inputs, past_key_values=cache, use_cache=cache is not None).logits
        return logits

    def _mask(self, ids: Nodes) -> Tensor:
        """[rows, 1, length, prefix + length], 0 where a token may look and the dtype's lowest number elsewhere."""
        nodes = self._tensor(ids)
        ends = self._tensor(np.where(ids < 0, 0, self._tree.ends[np.maximum(ids, 0)]))
        # Padding is node -1 with end 0: it sees itself, and nothing else sees it.
        query, key = nodes[:, :, None], nodes[:, None, :]
        allowed = (key <= query) & (query < ends[:, None, :])
        dtype: torch.dtype = self._network.dtype
        mask = torch.zeros(
            (*allowed.shape[:2], self._cache.length + allowed.shape[2]), dtype=dtype, device=nodes.device
        )
        mask[:, :, self._cache.length :].masked_fill_(~allowed, torch.finfo(dtype).min)
        return mask[:, None]

    def _tensor(self, values: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


@contextmanager
def tree_forward(model: nn.Module, tree: TokenTree) -> Iterator[TreeForward]:
    """A `TreeForward` whose hook on the output embedding is gone after the block."""
    with torch.no_grad(), chosen_logits(model) as chosen:
        yield TreeForward(model, chosen, tree)


def _reads_tokens(model: nn.Module) -> Any:
    """What is called with tokens: PEFT's forward for virtual tokens would put them in front of every row itself."""
    return model.get_base_model() if virtual_tokens(model) else model  # type: ignore[operator]


def _virtual_prefix(model: Any, network: Any, chosen: ChosenPositions) -> PrefixCache:
    """Keys and values of the model's virtual tokens; empty where it has none."""
    if not virtual_tokens(model):
        return PrefixCache()
    assert isinstance(model, PeftModel)
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        return PrefixCache.holding([(layer.keys, layer.values) for layer in model.get_prompt(batch_size=1).layers])
    cache = PrefixCache()
    prompt = model.get_prompt(batch_size=1).to(network.get_input_embeddings().weight.dtype)
    chosen.mask = torch.zeros(prompt.shape[:2], dtype=torch.bool)
    chosen.mask[0, 0] = True
    with cache.keep():
        network(inputs_embeds=prompt, past_key_values=cache, use_cache=True)
    return cache


def _padded(rows: tuple[Nodes, ...]) -> Nodes:
    """[rows, longest] with -1 behind shorter rows."""
    padded = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def _first_places(rows: tuple[Nodes, ...], wanted: Nodes) -> Nodes:
    """Per wanted node, where it stands in the padded rows (row-major); a node in several rows counts in the first."""
    longest = max(map(len, rows))
    nodes = np.concatenate(rows)
    places = np.concatenate([place * longest + np.arange(len(row)) for place, row in enumerate(rows)])
    order = np.argsort(nodes, kind="stable")
    found: Nodes = places[order[np.searchsorted(nodes[order], wanted)]]
    return found
