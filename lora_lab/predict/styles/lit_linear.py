"""Linear layers that keep what lit-gpt's kept: plain, packed to four bits as bitsandbytes 0.41 did, and with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.plan.quantized import BLOCK_WEIGHTS, NESTED_BLOCK_CONSTANTS

TuningKind = Literal["none", "full", "lora", "prompt", "prompt_and_scale"]


@dataclass(frozen=True, slots=True)
class Packing:
    """Weights in four bits. nested: the constants of their blocks are quantized once more."""

    nested: bool


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is trained. targets: products that have a low-rank adapter: q, k, v, o, mlp, head. dropout: of its input.

    prompt: ten learned tokens that each layer but the first two attends to (LLaMA-Adapter); prompt_and_scale: also a
    scale and a bias of every output, and the norms (its version 2).
    """

    kind: TuningKind
    rank: int = 0
    targets: frozenset[str] = frozenset()
    dropout: float = 0.0


class PackedProduct(torch.autograd.Function):
    """x W^T + b from a packed W: unpacked anew forward and backward. x is kept although W has no gradient, as it was.

    The constants of that version stand for half precision, so the matrix is unpacked to half and then cast: for a
    moment there are two copies of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        output = F.linear(x, layer.unpacked(x.dtype), layer.bias)
        ctx.kept = x if ctx.needs_input_grad[0] else None
        ctx.layer = layer
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """gradient: [..., out]."""
        back = gradient @ ctx.layer.unpacked(gradient.dtype) if ctx.needs_input_grad[0] else None
        return back, None


class PackedLinear(nn.Module):
    """A frozen matrix in four bits with the constants of its blocks; its bias is not packed."""

    constants: Tensor

    def __init__(self, inputs: int, outputs: int, *, bias: bool, packing: Packing) -> None:
        super().__init__()
        self.in_features, self.out_features, self.packing = inputs, outputs, packing
        self.weight = nn.Parameter(torch.empty(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        blocks = -(-inputs * outputs // BLOCK_WEIGHTS)
        self.register_buffer("constants", torch.empty(blocks, dtype=torch.uint8 if packing.nested else torch.float32))
        if packing.nested:
            self.register_buffer("nested", torch.empty(-(-blocks // NESTED_BLOCK_CONSTANTS), dtype=torch.float32))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in dtype, by way of half precision."""
        constants = self.constants.to(torch.float32)
        half = self.weight.new_empty((self.out_features, self.in_features), dtype=torch.float16)
        del constants
        return half.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. One token alone is multiplied by the packed matrix itself."""
        if x.numel() == x.shape[-1] and not x.requires_grad:
            return x.new_empty((*x.shape[:-1], self.out_features))
        output: Tensor = PackedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return output


class ScaledLinear(nn.Module):
    """scale * (x W^T + bias), scale and bias trained (LLaMA-Adapter, version 2)."""

    def __init__(self, linear: nn.Module, outputs: int) -> None:
        super().__init__()
        self.linear = linear
        self.adapter_bias = nn.Parameter(torch.empty(outputs))
        self.adapter_scale = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]."""
        return self.adapter_scale * (self.linear(x) + self.adapter_bias)


class AdaptedLinear(nn.Module):
    """x W^T + s dropout(x) A^T B^T."""

    def __init__(self, linear: nn.Module, inputs: int, outputs: int, tuning: Tuning) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = tuning.dropout
        self.lora_A = nn.Parameter(torch.empty(tuning.rank, inputs))
        self.lora_B = nn.Parameter(torch.empty(outputs, tuning.rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, in]."""
        output: Tensor = self.linear(x)
        down = dropped(x, self.dropout) @ self.lora_A.transpose(0, 1)
        return output + (down @ self.lora_B.transpose(0, 1)) * _SCALE


class AdaptedJointLinear(nn.Module):
    """Queries, keys and values in one product, adapters on some of the three: one A, and B by grouped convolution.

    widths: outputs of the three. What has no adapter gets zeros, by copying into a tensor of the full width.
    """

    def __init__(self, linear: nn.Module, inputs: int, widths: Sequence[int], tuning: Tuning) -> None:
        super().__init__()
        self.linear = linear
        self.dropout, self.outputs = tuning.dropout, sum(widths)
        adapted = [name in tuning.targets for name in "qkv"]
        self.adapted = [width for width, has in zip(widths, adapted, strict=True) if has]
        self.all_adapted, self.equal = all(adapted), len(set(widths)) == 1
        self.lora_A = nn.Parameter(torch.empty(tuning.rank * len(self.adapted), inputs))
        self.lora_B = nn.Parameter(torch.empty(sum(self.adapted), tuning.rank))
        ends = [sum(widths[: place + 1]) for place in range(len(widths))]
        spans = [range(end - width, end) for end, width, has in zip(ends, widths, adapted, strict=True) if has]
        self.columns = [column for span in spans for column in span]

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, in]. Returns [batch, length, sum of widths]."""
        output: Tensor = self.linear(x)
        down = F.linear(dropped(x, self.dropout), self.lora_A).transpose(-2, -1)
        up = self._convolved(down, self.lora_B.unsqueeze(-1)).transpose(-2, -1)
        return output + self._spread(up) * _SCALE

    def _convolved(self, down: Tensor, weight: Tensor) -> Tensor:
        if self.equal:
            return F.conv1d(down, weight, groups=len(self.adapted))
        parts = zip(down.chunk(len(self.adapted), dim=1), weight.split(self.adapted), strict=True)
        return torch.cat([F.conv1d(part, its_weight) for part, its_weight in parts], dim=1)

    def _spread(self, up: Tensor) -> Tensor:
        if self.all_adapted:
            return up
        up = up.transpose(0, 1)
        full = up.new_zeros((*up.shape[:-1], self.outputs)).view(-1, self.outputs)
        columns = torch.tensor(self.columns, device=full.device)
        full = full.index_copy(1, columns, up.reshape(-1, len(self.columns)))
        return full.view((*up.shape[:-1], self.outputs)).transpose(0, 1)


# Any number but 1 and 0: what matters is that there is a product.
_SCALE = 2.0


def dropped(x: Tensor, probability: float) -> Tensor:
    """Dropout as CUDA computes it: one operation that keeps a mask of a byte each (on a CPU torch keeps factors)."""
    return torch.native_dropout(x, probability, True)[0] if probability else x


def linear(inputs: int, outputs: int, *, bias: bool, packing: Packing | None, tuning: Tuning, target: str) -> nn.Module:
    """The layer for one product of a block, or the head (target: its name in `Tuning.targets`)."""
    plain = _base(inputs, outputs, bias, packing)
    if tuning.kind == "prompt_and_scale":
        return ScaledLinear(plain, outputs)
    return AdaptedLinear(plain, inputs, outputs, tuning) if target in tuning.targets else plain


def joint_linear(
    inputs: int, widths: Sequence[int], *, bias: bool, packing: Packing | None, tuning: Tuning
) -> nn.Module:
    """The layer that makes queries, keys and values."""
    plain = _base(inputs, sum(widths), bias, packing)
    if tuning.kind == "prompt_and_scale":
        return ScaledLinear(plain, sum(widths))
    return AdaptedJointLinear(plain, inputs, widths, tuning) if tuning.targets & set("qkv") else plain


def _base(inputs: int, outputs: int, bias: bool, packing: Packing | None) -> nn.Module:
    if packing is None:
        return nn.Linear(inputs, outputs, bias=bias)
    return PackedLinear(inputs, outputs, bias=bias, packing=packing)
