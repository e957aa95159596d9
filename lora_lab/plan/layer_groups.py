"""A short list of values spread over the decoder layers: one per group of layers, lowest first, scaled to any depth.

With n values and L layers, layer l (from 0) belongs to group floor(l n / L): groups of equal size where n divides L
(MoLA's shapes on 32 layers), else of sizes that differ by one. As many values as layers give each layer its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from lora_lab.errors import InputError, Problem

T = TypeVar("T")

# The number behind the last list of layers in a module's name: model.layers.3.mlp, transformer.h.3.attn.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.([0-9]+)(?:\.|$)")


def per_layer(values: Sequence[T], num_layers: int, *, where: str) -> tuple[T, ...]:
    """The value of each layer.

    Raises:
        InputError: at `where`, for more values than layers.
    """
    if len(values) > num_layers:
        raise InputError(
            Problem(where, f"{len(values)} entries for a model of {num_layers} layers; use at most as many")
        )
    return tuple(values[layer * len(values) // num_layers] for layer in range(num_layers))


def layer_of(module_name: str) -> int | None:
    """The decoder layer that a module or parameter lies in; None for embedding, head and final norm."""
    found = _LAYER.search(module_name)
    return None if found is None else int(found.group(1))
