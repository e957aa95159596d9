"""4-bit weights as they really are: how many, of which kind, and their bytes, read from the tensors.

bitsandbytes keeps for each 4-bit weight its packed nibbles, one scale per block of 64 values (float32, or 8 bits plus
one float32 per 256 scales and one offset per weight with double quantization) and code books (the 4-bit levels, and the
levels of the 8-bit scales).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """What `measure_packed` found. `constant_bytes`: scales and offsets; `code_book_bytes`: one set per weight."""

    kind: str
    double_quantization: bool
    tensors: int
    parameters: int
    packed_bytes: int
    constant_bytes: int
    code_book_bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight with scales and offsets, without code books (QLoRA: 4.127 with double quantization)."""
        return 8 * (self.packed_bytes + self.constant_bytes) / self.parameters


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every 4-bit layer."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            yield name, module


def measure_packed(model: nn.Module) -> PackedWeights | None:
    """Counts and bytes of all 4-bit weights of `model`, or None if it has none.

    Raises:
        ValueError: the weights are of more than one kind.
    """
    states = [(module.weight, module.weight.quant_state) for _, module in packed_layers(model)]
    if not states:
        return None
    kinds = {(state.quant_type, bool(state.nested)) for _, state in states}
    if len(kinds) > 1:
        raise ValueError(f"expected one kind of 4-bit weights, found {sorted(kinds)}")
    kind, nested = kinds.pop()
    return PackedWeights(
        kind=kind,
        double_quantization=nested,
        tensors=len(states),
        parameters=sum(state.shape.numel() for _, state in states),
        packed_bytes=sum(weight.nbytes for weight, _ in states),
        constant_bytes=sum(tensor.nbytes for _, state in states for tensor in _constants(state)),
        code_book_bytes=sum(tensor.nbytes for _, state in states for tensor in _code_books(state)),
    )


def keep_packed_layout(model: nn.Module) -> None:
    """Forbids bitsandbytes to repack 4-bit weights for the CPU at the first forward pass in eval mode.

    On CPUs with AVX-512 BF16, bitsandbytes 0.50 would rewrite each weight for an inference kernel that computes in
    bfloat16 whatever the model's precision is (measured: logits off by 1 on SmolLM2 in fp32) and that has no backward
    pass: training after an evaluation would go on with missing gradients. Scores would also depend on the kind of CPU.
    """
    for _, module in packed_layers(model):
        module.support_avx512bf16_for_cpu = False


def _constants(state: Any) -> list[torch.Tensor]:
    return [state.absmax, state.offset, state.state2.absmax] if state.nested else [state.absmax]


def _code_books(state: Any) -> list[torch.Tensor]:
    return [state.code, state.state2.code] if state.nested else [state.code]
