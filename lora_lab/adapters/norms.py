"""Norms of a model's weights and of what training has changed, by layer: the observation that LISA starts from.

A layer's norm is the Frobenius norm of all its parameters together. The paper (Pan et al. 2024, section 3.1) plots the
mean norm of a layer's weights over the steps; here both are logged at every observation: of the weights as they are
with what was trained, and of the change alone. "embedding" and "head" are layers of their own; a tied head is the
embedding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
        """The tensor called `name` there, or None."""
        return self._files[name].get_tensor(name) if name in self._files else None


def layer_norms(model: Any, original: OriginalWeights | None) -> dict[str, dict[str, float]]:
    """`weight` and `update`: norm by layer ("0", "1", ..., "embedding", "final_norm", "head").

    original: for a model whose own weights are trained. Of an adapter the change is that of LoRA's merged updates;
    other adapters change no weight, and have no `update`. A layer is left out where one of its weights is quantized, or
    has no original under its name.
    """
    squares: dict[str, dict[str, float]] = {"weight": defaultdict(float), "update": defaultdict(float)}
    unknown: set[str] = set()
    adapted = _adapted(model)
    with torch.no_grad():
        for name, parameter in _own_weights(model):
            place = _place(name)
            first = None if original is None else original.get(name)
            if not parameter.is_floating_point() or (original is not None and first is None):
                unknown.add(place)
            elif first is not None:
                squares["weight"][place] += _square(parameter)
                squares["update"][place] += _square(parameter - first.to(parameter))
            elif (change := _change(adapted.get(name))) is not None:
                squares["weight"][place] += _square(parameter + change)
                squares["update"][place] += _square(change)
            else:
                squares["weight"][place] += _square(parameter)
                squares["update"][place] += 0.0
    known = {
        kind: {place: math.sqrt(square) for place, square in by_place.items() if place not in unknown}
        for kind, by_place in squares.items()
    }
    return known if original is not None or adapted else {"weight": known["weight"]}


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


def _change(layer: Any | None) -> Tensor | None:
    """What the active adapters of a layer add to its weight, in the weight's layout; None without any."""
    if layer is None:
        return None
    present = {*layer.lora_A, *layer.lora_embedding_A}
    changes = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in present]
    return torch.stack(changes).sum(0) if changes else None


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


def observed_updates(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """The updates of a run's observations of kind `norms`, those that have one."""
    return [line["update"] for line in lines if line.get("update")]
