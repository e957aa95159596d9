"""Quantized weights as they really are: how many, of which kind, and their bytes, read from the tensors.

bitsandbytes keeps for each 4-bit weight its packed nibbles, one scale per block of 64 values (float32, or 8 bits plus
one float32 per 256 scales and one offset per weight with double quantization) and code books (the 4-bit levels, and the
levels of the 8-bit scales). An 8-bit weight is one byte per value and one float32 scale per output; outlier features
are found in the activations of each product, nothing of them is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

# Features of this magnitude are multiplied without quantization (LLM.int8, Dettmers et al. 2022, section 3.2).
OUTLIER_THRESHOLD = 6.0


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """What `measure_packed` found.

    kind: nf4, fp4 or int8. constant_bytes: scales and offsets; code_book_bytes: one set per weight, none for int8.
    outlier_threshold: for int8, the magnitude from which a feature of the input is not quantized; else None.
    """

    kind: str
    double_quantization: bool
    tensors: int
    parameters: int
    packed_bytes: int
    constant_bytes: int
    code_book_bytes: int
    outlier_threshold: float | None

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight with scales and offsets, without code books (QLoRA: 4.127 with double quantization)."""
        return 8 * (self.packed_bytes + self.constant_bytes) / self.parameters


def is_four_bit(layer: nn.Module) -> bool:
    """Whether the layer's own weight is nf4 or fp4."""
    return getattr(_own_weight(layer), "quant_state", None) is not None


def is_eight_bit(layer: nn.Module) -> bool:
    """Whether the layer's own weight is int8."""
    return getattr(_own_weight(layer), "dtype", None) == torch.int8


def _own_weight(layer: nn.Module) -> Any:
    """An adapter's layer has a `weight` too: that of the layer it wraps."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with a quantized weight."""
    for name, module in model.named_modules():
        if is_four_bit(module) or is_eight_bit(module):
            yield name, module


def measure_packed(model: nn.Module) -> PackedWeights | None:
    """Counts and bytes of all quantized weights of `model`, or None if it has none.

    Raises:
        ValueError: the weights are of more than one kind.
    """
    layers = [_measured(layer) for _, layer in packed_layers(model)]
    if not layers:
        return None
    kinds = {(layer.kind, layer.double_quantization) for layer in layers}
    if len(kinds) > 1:
        raise ValueError(f"expected one kind of quantized weights, found {sorted(kinds)}")
    return replace(
        layers[0],
        tensors=len(layers),
        parameters=sum(layer.parameters for layer in layers),
        packed_bytes=sum(layer.packed_bytes for layer in layers),
        constant_bytes=sum(layer.constant_bytes for layer in layers),
        code_book_bytes=sum(layer.code_book_bytes for layer in layers),
    )


def _measured(layer: Any) -> PackedWeights:
    if is_eight_bit(layer):
        return PackedWeights(
            kind="int8",
            double_quantization=False,
            tensors=1,
            parameters=layer.weight.numel(),
            packed_bytes=layer.weight.nbytes,
            constant_bytes=layer.row_scales.nbytes,
            code_book_bytes=0,
            outlier_threshold=layer.state.threshold,
        )
    state = layer.weight.quant_state
    return PackedWeights(
        kind=state.quant_type,
        double_quantization=bool(state.nested),
        tensors=1,
        parameters=state.shape.numel(),
        packed_bytes=layer.weight.nbytes,
        constant_bytes=sum(tensor.nbytes for tensor in _constants(state)),
        code_book_bytes=sum(tensor.nbytes for tensor in _code_books(state)),
        outlier_threshold=None,
    )


def keep_packed_layout(model: nn.Module) -> None:
    """Forbids bitsandbytes to repack 4-bit weights for the CPU at the first forward pass in eval mode.

    On CPUs with AVX-512 BF16, bitsandbytes 0.50 would rewrite each weight for an inference kernel that computes in
    bfloat16 whatever the model's precision is (measured: logits off by 1 on SmolLM2 in fp32) and that has no backward
    pass: training after an evaluation would go on with missing gradients. Scores would also depend on the kind of CPU.
    """
    for _, module in packed_layers(model):  # 8-bit layers have no such switch and ignore it
        module.support_avx512bf16_for_cpu = False


def _constants(state: Any) -> list[torch.Tensor]:
    return [state.absmax, state.offset, state.state2.absmax] if state.nested else [state.absmax]


def _code_books(state: Any) -> list[torch.Tensor]:
    return [state.code, state.state2.code] if state.nested else [state.code]
