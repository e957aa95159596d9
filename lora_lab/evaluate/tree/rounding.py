"""How much of a logit is rounding, where arithmetic is narrower than float32."""

from __future__ import annotations

import math
from typing import Any

import torch

from lora_lab.models.packed import is_eight_bit, packed_layers


def logit_rounding(model: Any, *, autocast: torch.dtype | None = None) -> float | None:
    """The rounding error of a logit, relative to the largest logit; None where all is float32 or float64.

    Each of the 2 L + 1 terms that L layers and the embedding put into the residual stream is off by step / sqrt(12) of
    its size, which adds up like a random walk and reaches the largest logit in proportion; one step at least. An
    estimate: trees of 24 tiny architectures in bf16 and fp16, and SmolLM2-135M in bf16 and nf4, stay within half of it
    in the root mean square.

    autocast: the dtype of forward passes, where it is another than the model's.
    """
    dtypes = {model.dtype, autocast or model.dtype}
    is_wide = dtypes <= {torch.float32, torch.float64} and torch.get_float32_matmul_precision() == "highest"
    is_quantized = getattr(model, "is_quantized", False) or any(True for _ in packed_layers(model))
    if model.dtype == torch.float64 or (is_wide and not is_quantized):
        return None
    # LLM.int8 multiplies activations in 127 steps up to their largest, whatever the dtype around it.
    steps = [1 / 127] if any(is_eight_bit(layer) for _, layer in packed_layers(model)) else []
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return max([*(torch.finfo(dtype).eps for dtype in dtypes), *steps]) * max(1.0, math.sqrt((2 * layers + 1) / 12))
