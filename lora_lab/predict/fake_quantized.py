"""Quantized weights without values: bitsandbytes' own layers over fake tensors of the packed sizes.

bitsandbytes' parameters cannot be built of fake tensors. Here a fake parameter is given the name of their class and
what its layers and PEFT ask of it; the layers' arithmetic is bitsandbytes' own (its operators tell the shapes of their
results) and, for int8, the lab's. Code books and offsets count as they lie in memory (`plan.quantized`).
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lora_lab.models.int8 import use_one_product
from lora_lab.plan.quantized import BLOCK_WEIGHTS, NESTED_BLOCK_CONSTANTS
from lora_lab.schema.adaptation import Quantization


class _Params4bit(FakeTensor):
    """A fake 4-bit weight."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Params4bit:
        return self  # PEFT copies a layer to look at its weight


class _Int8Params(FakeTensor):
    """A fake 8-bit weight."""


# PEFT and transformers know quantized weights by the name of their class.
_Params4bit.__name__, _Int8Params.__name__ = "Params4bit", "Int8Params"


def fake_four_bit(network: nn.Module, quantization: Quantization, dtype: torch.dtype, mode: FakeTensorMode) -> None:
    """Gives every `Linear4bit` of `network` a packed weight [ceil(out in / 2), 1] with its constants."""
    for layer in network.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = _state(layer, quantization, dtype, mode)
            with mode:
                packed = torch.empty((-(-state.shape.numel() // 2), 1), dtype=torch.uint8)
            weight: Any = nn.Parameter(packed, requires_grad=False)
            weight.__class__ = _Params4bit
            weight.quant_state, weight.bnb_quantized = state, True
            weight.quant_type, weight.quant_storage = quantization.kind, torch.uint8
            weight.compress_statistics, weight.blocksize = quantization.double_quantization, BLOCK_WEIGHTS
            layer.weight = weight
            layer.support_avx512bf16_for_cpu = False  # see models.packed.keep_packed_layout


def fake_int8(network: nn.Module, mode: FakeTensorMode) -> None:
    """Puts the lab's int8 layers in the place of every `Linear8bitLt` of `network`, over fake codes and scales.

    No feature is an outlier here: which ones are depends on values.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, bitsandbytes.nn.Linear8bitLt)]
    for layer in layers:
        with mode:
            codes = torch.empty((layer.out_features, layer.in_features), dtype=torch.int8)
            scales = torch.empty(layer.out_features, dtype=torch.float32)
        weight: Any = nn.Parameter(codes, requires_grad=False)
        weight.__class__ = _Int8Params
        weight.CB, weight.SCB = None, scales
        layer.weight = weight
        layer.state.threshold = 0.0
    use_one_product(network, check=False)


def _state(layer: Any, quantization: Quantization, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    shape = torch.Size([layer.out_features, layer.in_features])
    blocks = -(-shape.numel() // BLOCK_WEIGHTS)
    nested = None
    with mode:
        code = torch.empty(16, dtype=torch.float32)
        absmax = torch.empty(blocks, dtype=torch.uint8 if quantization.double_quantization else torch.float32)
        offset = torch.empty((), dtype=torch.float32) if quantization.double_quantization else None
        if quantization.double_quantization:
            nested = bitsandbytes.functional.QuantState(
                absmax=torch.empty(-(-blocks // NESTED_BLOCK_CONSTANTS), dtype=torch.float32),
                code=torch.empty(256, dtype=torch.float32),
                blocksize=NESTED_BLOCK_CONSTANTS,
                dtype=torch.float32,
            )
    return bitsandbytes.functional.QuantState(
        absmax=absmax,
        shape=shape,
        code=code,
        blocksize=BLOCK_WEIGHTS,
        quant_type=quantization.kind,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
