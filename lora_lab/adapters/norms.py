"""Norms of a model's weights and of what training has changed, by layer: the observation that LISA starts from.

A layer's norm is the Frobenius norm of all its parameters together. The paper (Pan et al. 2024, section 3.1) plots the
mean norm of a layer's weights over the steps; here both are logged at every observation: of the weights as they are
with what was trained, and of the change alone. "embedding" and "head" are layers of their own; a tied head is the
embedding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn

from lora_lab.plan.layer_groups import layer_of


class OriginalWeights:
    """Weights of a model folder, read one at a time: what a training of the model's own weights started from."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened: Any = safe_open(file, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def get(self, name: str) -> Tensor | None:
        """The tensor called `name` there, or None. Older folders (GPT-2) leave the model's prefix out of the names."""
        for key in (name, name.partition(".")[2]):
            if key in self._files:
                found: Tensor = self._files[key].get_tensor(key)
                return found
        return None


def layer_norms(model: Any, original: OriginalWeights | None) -> dict[str, dict[str, float]]:
    """`weight` and `update`: norm by layer ("0", "1", ..., "embedding", "final_norm", "head").

    original: for a model whose own weights are trained. Of an adapter the change is what merging LoRA's active adapters
    would change (DoRA's rescaling included); other adapters change no weight, and have no `update`. A layer is left out
    where one of its weights has no original under its name; of `weight`, and with DoRA of `update`, also where one is
    quantized.
    """
    squares: dict[str, dict[str, float]] = {"weight": defaultdict(float), "update": defaultdict(float)}
    unknown: dict[str, set[str]] = {"weight": set(), "update": set()}
    adapted = _adapted(model)
    with torch.no_grad():
        for name, parameter in _own_weights(model):
            pair = _pair(parameter, adapted.get(name)) if original is None else _against(parameter, original.get(name))
            for kind, tensor in zip(squares, pair, strict=True):
                place = _place(name)
                if tensor is None:
                    unknown[kind].add(place)
                else:
                    squares[kind][place] += _square(tensor)
    known = {
        kind: {place: math.sqrt(square) for place, square in by_place.items() if place not in unknown[kind]}
        for kind, by_place in squares.items()
    }
    return known if original is not None or adapted else {"weight": known["weight"]}


def _against(parameter: nn.Parameter, first: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A trained weight and its change; (None, None) where it cannot be told."""
    if first is None or _is_quantized(parameter):
        return None, None
    return parameter, parameter - first.to(parameter)


def _pair(parameter: nn.Parameter, layer: Any | None) -> tuple[Tensor | None, Tensor | None]:
    """A frozen weight with what its LoRA layer adds, and that alone; None for what cannot be told."""
    quantized = _is_quantized(parameter)
    adapters = [] if layer is None else [one for one in layer.active_adapters if one in _present(layer)]
    if layer is None or not adapters:
        nothing = torch.zeros((), device=parameter.device)
        return None if quantized else parameter, nothing
    if quantized and any(layer.use_dora.get(one) for one in adapters):
        return None, None
    change = torch.stack([_change(layer, one, parameter) for one in adapters]).sum(0)
    return None if quantized else parameter + change, change


def _change(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """What an adapter adds to the weight, in the weight's layout."""
    delta: Tensor = layer.get_delta_weight(adapter)
    if not layer.use_dora.get(adapter):
        return delta
    moved = weight + delta
    magnitude = layer.lora_magnitude_vector[adapter].weight
    # One magnitude per output: a row of a linear layer, a column of Conv1D's transposed weight and of an embedding.
    outputs = 1 if layer.fan_in_fan_out or adapter in layer.lora_embedding_A else 0
    scales = (magnitude.reshape(-1) / torch.linalg.vector_norm(moved, dim=1 - outputs)).unsqueeze(1 - outputs)
    change: Tensor = scales * moved - weight
    return change


def _present(layer: Any) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def _is_quantized(parameter: nn.Parameter) -> bool:
    return not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None


def _own_weights(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's own parameters under their own names, whatever PEFT has wrapped around them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = _adapter_parameters(base)
    for name, parameter in base.named_parameters():
        if id(parameter) not in adapters:
            yield name.replace(".base_layer", ""), parameter


def _adapter_parameters(base: nn.Module) -> set[int]:
    found: set[int] = set()
    for module in base.modules():
        for key in getattr(module, "adapter_layer_names", ()):
            entry = getattr(module, key, None)
            found |= {id(one) for one in (entry.parameters() if isinstance(entry, nn.Module) else ())}
        for key in getattr(module, "other_param_names", ()):
            entry = getattr(module, key, None)
            found |= {id(one) for one in (entry.parameters() if isinstance(entry, nn.Module) else ())}
    return found


def _adapted(model: Any) -> dict[str, LoraLayer]:
    """Name of a weight -> the LoRA layer around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = ((name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer))
    return {f"{name}.weight".replace(".base_layer", ""): module for name, module in layers}


def _place(name: str) -> str:
    layer = layer_of(name)
    if layer is not None:
        return str(layer)
    if "norm" in name or "ln_f" in name:
        return "final_norm"
    return "head" if "lm_head" in name else "embedding"


def _square(tensor: Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=wide)) ** 2
