"""What a set of requests costs at least: tokens and arithmetic of its prefix tree, counted apart from the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lora_lab.evaluate.lab_model import Pair
from lora_lab.evaluate.tree.token_tree import ScoredRow, token_tree


@dataclass(frozen=True, slots=True)
class Work:
    """flat_tokens: inputs of all requests. nodes: of their tree. scored_nodes: those at which something is predicted.
    attended: pairs of a node and itself or an ancestor. prefix_tokens: what all inputs begin with."""

    flat_tokens: int
    nodes: int
    scored_nodes: int
    attended: int
    prefix_tokens: int

    def operations(self, model: nn.Module) -> int:
        """Multiplications and additions that no engine can do without: 2 per weight of the linear layers and node,
        2 per weight of the output embedding and scored node, 4 per attended pair, channel of the heads and layer."""
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        channels = config.num_hidden_layers * config.num_attention_heads * size
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        return (
            2 * linear_weights(model) * self.nodes
            + 2 * head.weight.numel() * self.scored_nodes
            + 4 * channels * self.attended
        )


def work_of(pairs: Sequence[Pair], *, max_length: int) -> Work:
    """The work of tokenised requests; a pair without a continuation is a prompt to generate from."""
    rows = [
        ScoredRow.of(context, continuation, max_length=max_length)
        if continuation
        else ScoredRow(tuple(context[-max_length:]), ())
        for _, context, continuation in pairs
    ]
    tree = token_tree(rows)
    asked = [tree.paths[path][-len(row.targets) :] for row, path in zip(rows, tree.path_of, strict=True) if row.targets]
    return Work(
        flat_tokens=sum(len(row.tokens) for row in rows),
        nodes=tree.size,
        scored_nodes=len(np.unique(np.concatenate(asked))) if asked else 0,
        attended=int((tree.depths + 1).sum()),
        prefix_tokens=_common(min(rows, key=lambda row: row.tokens).tokens, max(row.tokens for row in rows)),
    )


def linear_weights(model: nn.Module) -> int:
    """Weights of all linear layers but the output embedding."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    )


def _common(first: Sequence[int], last: Sequence[int]) -> int:
    """What the first and the last of sorted sequences have in common is common to all."""
    return next(
        (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
