"""A quantized base turned back into plain layers, with the adapters that stood on it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lab.models.packed import is_four_bit, packed_layers

_LARGEST_CODE = 127


def on_plain_base(model: PeftModel) -> tuple[PeftModel, list[nn.Module]]:
    """The same active adapters on the same base without quantized layers, and the layers that took their place.

    Those hold float32 weights: the values by which a 4-bit layer multiplies, or scale x code / 127 of an int8 layer.
    Takes `model` over.
    """
    if not any(True for _ in packed_layers(model)):
        return model, []
    names = list(model.active_adapters)
    configs = [replace(model.peft_config[name], inference_mode=True) for name in names]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = [get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in names]
        inner = model.get_base_model()
        inner.is_loaded_in_4bit = inner.is_loaded_in_8bit = False  # or PEFT would not take an IA3 off
        base = model.unload()
        layers = dequantize(base)
        plain = get_peft_model(base, configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            plain.add_adapter(name, config)
        for name, tensors in zip(names, weights, strict=True):
            set_peft_model_state_dict(plain, tensors, adapter_name=name)
        plain.base_model.set_adapter(names, inference_mode=True)
    return plain.eval(), layers


def dequantize(base: Any) -> list[nn.Module]:
    """Replaces every quantized layer of a transformers model by a plain one, and returns these; raises nothing."""
    layers = []
    for name, layer in list(packed_layers(base)):
        plain = _plain_layer(layer)
        base.set_submodule(name, plain)
        layers.append(plain)
    base.hf_quantizer = None
    base.is_quantized = False
    for owner, key in ((base, "quantization_method"), (base.config, "quantization_config")):
        if hasattr(owner, key):
            delattr(owner, key)
    return layers


def _plain_layer(layer: Any) -> nn.Module:
    weight = _weight(layer)
    if issubclass(layer.source_cls, Conv1D):  # GPT-2 keeps its matrices transposed
        plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return plain


def _weight(layer: Any) -> Tensor:
    """[out, in], float32."""
    if not is_four_bit(layer):
        scaled: Tensor = layer.weight.data * (layer.row_scales[:, None] / _LARGEST_CODE)
        return scaled
    import bitsandbytes  # there, since the layer is its own

    packed = layer.weight
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    return weight.to(layer.compute_dtype).to(torch.float32)
