"""The modules of a real model that a target names; `plan.targets` does the same from the shape, without weights."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.targets import name_matches, part_suffixes
from lora_lab.schema.adaptation import Target
from lora_lab.schema.method import METHODS

_NAME = re.compile(r"[A-Za-z0-9_.*]+")


def find_targets(model: Any, target: Target, *, kind: str = "lora") -> list[str]:
    """Full names, in the model's order, of the linear layers and embeddings that `target` names for a method of `kind`.

    Raises:
        InputError: with one problem per part or name that matches no such layer, and for a head or an embedding whose
            weight is also the other's (tied).
    """
    layers = _layers(model)
    suffixes = part_suffixes(model.config.model_type, kind=kind) if target.parts else {}
    wanted = {f"target.{part}": suffixes[part] for part in target.parts}
    wanted |= {f"target.modules: {name}": (name,) for name in target.modules}
    chosen: set[str] = set()
    problems = []
    for where, names in wanted.items():
        for name in names:
            matched = {layer for layer in layers if _NAME.fullmatch(name) and name_matches(layer, name)}
            chosen |= matched
            if not matched:
                ends = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
                problems.append(Problem(where, f'no layer is named "{name[:100]}"' + nearest(name, ends)))
    if METHODS[kind].trains == "adapter":
        problems += _tied_problems(model, layers, chosen)
    if problems:
        raise InputError(problems)
    return [name for name in layers if name in chosen]


def _layers(model: Any) -> dict[str, Any]:
    """Layers that can carry an adapter; one that carries an adapter already counts as itself, its insides do not."""
    layers: dict[str, Any] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside |= {f"{name}.{inner}" for inner, _ in module.named_modules() if inner}
        plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if name not in inside and isinstance(plain, (nn.Linear, nn.Embedding, Conv1D)):
            layers[name] = plain
    return layers


def _tied_problems(model: Any, layers: dict[str, Any], chosen: set[str]) -> list[Problem]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return []
    rule = (
        "its weight is head and embedding at once (tied), an adapter would change both; use model.tie_embeddings=false"
    )
    shared = [name for name in layers if name in chosen and layers[name].weight is head.weight]
    return [Problem("target", f"{name}: {rule}") for name in shared]
