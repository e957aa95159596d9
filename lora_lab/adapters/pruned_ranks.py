"""AdaLoRA's pruned ranks on disk and back.

In training PEFT keeps all `init_r` triplets of a matrix and holds the pruned entries of E at 0; on disk it cuts them
out by `rank_pattern`, a mask for each E. Three things go wrong there:

1. An entry that has moved since it was last pruned (the optimizer goes on between two allocations) is cut out all the
   same. Here only what is 0 is cut.
2. On a half-precision base PEFT rounds the cut weights to the base's precision when it loads them. There nothing is cut
   and no pattern is written, so that plain PEFT too gives the same logits back.
3. PEFT looks for the adapter's name anywhere in a layer's name, and misses the layer where it finds it. Loading by
   `cut_layers` has no such names; plain PEFT needs a name that is no part of a layer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model_state_dict
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor

from lora_lab.errors import InputError, Problem

_HALF = (torch.bfloat16, torch.float16)
_ON_DISK = "base_model.model."


def pruned_state(model: Any, name: str) -> tuple[dict[str, Tensor], dict[str, list[bool]] | None]:
    """The tensors of adapter `name` as they go to disk, and their `rank_pattern`; `model` is left as it was."""
    config = model.peft_config[name]
    patterns = config.rank_pattern
    config.rank_pattern = None
    try:
        tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    finally:
        config.rank_pattern = patterns
    masks = {key.removesuffix(f".{name}"): list(mask) for key, mask in (patterns or {}).items()}
    is_cut = any(len(tensors[_ON_DISK + key]) != len(mask) for key, mask in masks.items())
    if is_cut or not masks:
        return tensors, masks or None
    if model.get_base_model().dtype in _HALF:
        return tensors, None
    for key, mask in masks.items():
        layer = (_ON_DISK + key).removesuffix("lora_E")
        kept = torch.tensor(mask) | (tensors[f"{layer}lora_E"][:, 0] != 0).cpu()
        masks[key] = kept.tolist()
        tensors[f"{layer}lora_E"] = tensors[f"{layer}lora_E"][kept]
        tensors[f"{layer}lora_A"] = tensors[f"{layer}lora_A"][kept]
        tensors[f"{layer}lora_B"] = tensors[f"{layer}lora_B"][:, kept]
    return tensors, masks


def cut_layers(model: Any, name: str, pattern: Mapping[str, list[bool]]) -> None:
    """Gives each layer of adapter `name`, attached with all its triplets, as many as its mask in `pattern` keeps.

    pattern: as in adapter_config.json, name of E -> mask. The scaling stays that of `init_r`, as in training.

    Raises:
        InputError: a name that is no layer of the adapter, or a mask of another length than init_r.
    """
    config: AdaLoraConfig = model.peft_config[name]
    layers = {
        f"{key}.lora_E": layer
        for key, layer in model.get_base_model().named_modules()
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_E
    }
    unknown = [key for key in pattern if key not in layers]
    wrong = [key for key, mask in pattern.items() if len(mask) != config.init_r]
    if unknown:
        raise InputError(Problem("rank_pattern", f"{len(unknown)} names without a layer: {', '.join(unknown[:3])}"))
    if wrong:
        raise InputError(
            Problem("rank_pattern", f"{wrong[0]}: expected {config.init_r} entries, got {len(pattern[wrong[0]])}")
        )
    for key, mask in pattern.items():
        layers[key].update_layer(name, sum(mask), config.lora_alpha, config=config)
        layers[key].ranknum[name].data.fill_(float(config.init_r))
    model.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)
