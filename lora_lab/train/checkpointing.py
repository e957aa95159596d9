"""Gradient checkpointing: activations are kept once per segment of layers and recomputed in the backward pass.

Always non-reentrant. A segment is one layer, k layers, or about sqrt(L) of them, the classic choice (Chen et al. 2016,
arXiv 1604.06174). transformers checkpoints single layers only; here the first layer of a segment runs all of it.

A prefix reaches the layers in a cache of keys and values, to which each layer adds its own. A layer that is computed
again would find them there and add them twice: layers are handed a view of the cache that keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from lora_lab.errors import InputError, Problem


def segment_layers(mode: str | int, num_layers: int) -> int | None:
    """Layers per segment for a setting of `training.gradient_checkpointing`; None where nothing is checkpointed.

    Raises:
        InputError: more layers per segment than the model has.
    """
    if mode == "off":
        return None
    if mode == "every_layer":
        return 1
    if mode == "sqrt":
        return max(1, round(math.sqrt(num_layers)))
    layers = int(mode)
    if layers > num_layers:
        raise InputError(
            Problem("training.gradient_checkpointing", f"must be <= {num_layers}, the model's layers, got {layers}")
        )
    return layers


def enable_checkpointing(model: nn.Module, mode: str | int) -> None:
    """Sets up checkpointing on a causal LM of transformers (or a PeftModel around one), to be trained.

    Raises:
        InputError: segments of several layers on a model whose layers differ in kind (their inputs differ too).
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    size = segment_layers(mode, base.config.num_hidden_layers)
    if size is None:
        return
    if size > 1 and len(set(getattr(base.config, "layer_types", None) or ["same"])) > 1:
        raise InputError(
            Problem("training.gradient_checkpointing", f"layers of {base.config.model_type} differ; use every_layer")
        )
    layers = list(decoder_layers(base))
    for start in range(0, len(layers), size):
        _join(layers[start : start + size])


def decoder_layers(base: Any) -> nn.ModuleList:
    """The decoder layers of a causal LM of transformers; raises InputError where no list of that length is found."""
    for module in base.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == base.config.num_hidden_layers:
            return module
    raise InputError(Problem("training.gradient_checkpointing", f"no list of layers found in {type(base).__name__}"))


def _join(segment: Sequence[nn.Module]) -> None:
    """The first layer's forward runs the segment under one checkpoint; the others pass their input on."""
    first, *rest = segment
    forwards: list[Callable[..., Tensor]] = [layer.forward for layer in segment]

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for forward in forwards:
            hidden = forward(hidden, *args, **kwargs)
        return hidden

    def run_checkpointed(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not first.training:
            return run(hidden, *args, **kwargs)
        args = tuple(map(_unstored, args))
        kwargs = {name: _unstored(value) for name, value in kwargs.items()}
        result: Tensor = checkpoint(run, hidden, *args, use_reentrant=False, **kwargs)
        return result

    def pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    first.forward = run_checkpointed
    for layer in rest:
        layer.forward = pass_on


class _UnstoredCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The keys and values of `cache`; those of the layer itself are put behind them and not kept."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=list(cache.layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to, each [rows, heads, prefix + length, head size]."""
        if layer_idx >= len(self.layers) or not self.layers[layer_idx].get_seq_length():
            return key_states, value_states
        layer = self.layers[layer_idx]
        return torch.cat((layer.keys, key_states), dim=-2), torch.cat((layer.values, value_states), dim=-2)


def _unstored(value: Any) -> Any:
    return _UnstoredCache(value) if isinstance(value, Cache) else value
