"""Norms and attention as lit-gpt computed them: float32 within, rotation in float32, keys repeated for shared heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.predict.styles.lit_linear import Packing, Tuning, joint_linear, linear
from lora_lab.predict.styles.lit_shapes import LitShape

_EPSILON = 1e-5
# Of LLaMA-Adapter: learned tokens, and the layers without them.
PROMPT_TOKENS = 10
LAYERS_WITHOUT_PROMPT = 2


class RootMeanSquareNorm(nn.Module):
    """x / rms(x) * weight, computed in float32: the copy of x, not x, is what backward reads.

    The cast is not in the commit that lit-gpt's resource tables name (8641822), but in one of four days later (6178c7c).
    Without it all published Llama rows lie 3 to 5 % above what is traced, with it none does; models with LayerNorm, which
    are not touched by it, agree either way. So the tables are taken to have been measured with it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        wide = x.float()
        inverse = torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + _EPSILON)
        return (self.weight * (wide * inverse)).to(x.dtype)


def norm_of(shape: LitShape) -> nn.Module:
    """The norm that a shape has."""
    return RootMeanSquareNorm(shape.hidden) if shape.norm == "rms" else nn.LayerNorm(shape.hidden)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (turned * sin)).type_as(x)


class KeptKeys:
    """Keys and values of the tokens so far, for generation: [1, heads, tokens, head size] each."""

    def __init__(self, shape: LitShape, tokens: int, like: Tensor) -> None:
        heads = 1 if shape.key_value_heads == 1 else shape.heads
        self.keys = like.new_zeros((1, heads, tokens, shape.head_size))
        self.values = like.new_zeros((1, heads, tokens, shape.head_size))

    def updated(self, place: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [1, heads, new tokens, head size]. Returns all that is kept."""
        return self.keys.index_copy_(2, place, k), self.values.index_copy_(2, place, v)


class Attention(nn.Module):
    """Causal attention; with a learned prompt, a second one over it, weighed by a gate."""

    def __init__(self, shape: LitShape, packing: Packing | None, tuning: Tuning, layer: int) -> None:
        super().__init__()
        self.shape = shape
        bias = shape.bias or shape.joint_bias
        self.attn = joint_linear(shape.hidden, shape.joint_widths, bias=bias, packing=packing, tuning=tuning)
        width = shape.joint_widths[0]
        self.proj = linear(width, shape.hidden, bias=shape.bias, packing=packing, tuning=tuning, target="o")
        self.has_prompt = tuning.kind.startswith("prompt") and layer >= LAYERS_WITHOUT_PROMPT
        if self.has_prompt:
            self.adapter_wte = nn.Embedding(PROMPT_TOKENS, shape.hidden)
            self.gating_factor = nn.Parameter(torch.empty(1, 1, shape.heads, 1))
        self.kept: KeptKeys | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: [batch, length, hidden]. cos, sin: [length, rotated]. place: of the tokens, where keys are kept."""
        batch, length, _ = x.shape
        q, k, v = self._split(self.attn(x), repeat=place is None or self.shape.key_value_heads != 1)
        turned = self.shape.rotated
        q_turned = _rotated(q[..., :turned], cos, sin)
        k_turned = _rotated(k[..., :turned], cos, sin)
        q = torch.cat((q_turned, q[..., turned:]), dim=-1)
        k = torch.cat((k_turned, k[..., turned:]), dim=-1)
        if self.kept is not None and place is not None:
            k, v = self.kept.updated(place, k, v)
        y = self._attended(q, k, v, mask)
        if self.has_prompt:
            y = y + self.gating_factor * self._attended_prompt(q)
        output: Tensor = self.proj(y.reshape(batch, length, -1))
        return output

    def _split(self, joint: Tensor, *, repeat: bool) -> tuple[Tensor, Tensor, Tensor]:
        """joint: [batch, length, widths]. Returns q, k, v: [batch, heads, length, head size]."""
        shape = self.shape
        batch, length, _ = joint.shape
        groups, share = shape.key_value_heads, shape.heads // shape.key_value_heads
        joint = joint.view(batch, length, groups, share + 2, shape.head_size).permute(0, 2, 3, 1, 4)
        q, k, v = joint.split((share, 1, 1), dim=2)
        if repeat:
            k = k.expand(batch, groups, share, length, shape.head_size)
            v = v.expand(batch, groups, share, length, shape.head_size)
        of_heads = (batch, -1, length, shape.head_size)
        return q.reshape(of_heads), k.reshape(of_heads), v.reshape(of_heads)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Returns [batch, length, heads, head size]."""
        scale = 1.0 / math.sqrt(self.shape.head_size)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=mask is None)
        return y.transpose(1, 2)

    def _attended_prompt(self, q: Tensor) -> Tensor:
        shape = self.shape
        joint = self.attn(self.adapter_wte.weight.reshape(1, PROMPT_TOKENS, shape.hidden))
        _, k, v = self._split(joint, repeat=True)
        mask = torch.ones(q.size(2), PROMPT_TOKENS, dtype=torch.bool, device=q.device)
        return self._attended(q, k, v, mask)
