"""A decoder that allocates and keeps what lit-gpt's did from October 2023 on; the head is computed in pieces."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.predict.styles.lit_attention import Attention, KeptKeys, norm_of
from lora_lab.predict.styles.lit_linear import Packing, Tuning, linear
from lora_lab.predict.styles.lit_shapes import LitShape


class Mlp(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    def __init__(self, shape: LitShape, packing: Packing | None, tuning: Tuning) -> None:
        super().__init__()
        self.kind = shape.mlp

        def product(inputs: int, outputs: int) -> nn.Module:
            return linear(inputs, outputs, bias=shape.bias, packing=packing, tuning=tuning, target="mlp")

        self.fc_1 = product(shape.hidden, shape.intermediate)
        if self.kind != "plain":
            self.fc_2 = product(shape.hidden, shape.intermediate)
        self.proj = product(shape.intermediate, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, hidden]."""
        if self.kind == "plain":
            x = self.fc_1(x)
            x = F.gelu(x)
        else:
            gate, up = self.fc_1(x), self.fc_2(x)
            x = (F.silu(gate) if self.kind == "gated_silu" else F.gelu(gate)) * up
        output: Tensor = self.proj(x)
        return output


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: LitShape, packing: Packing | None, tuning: Tuning, layer: int) -> None:
        super().__init__()
        self.parallel = shape.parallel
        self.norm_1 = norm_of(shape)
        self.attn = Attention(shape, packing, tuning, layer)
        self.norm_2 = None if shape.one_norm else norm_of(shape)
        self.mlp = Mlp(shape, packing, tuning)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: [batch, length, hidden]."""
        normed = self.norm_1(x)
        attended = self.attn(normed, cos, sin, place, mask)
        if self.parallel:
            second = normed if self.norm_2 is None else self.norm_2(x)
            x = x + attended + self.mlp(second)
            return x
        x = x + attended
        assert self.norm_2 is not None  # one norm for both is only met in parallel blocks
        x = x + self.mlp(self.norm_2(x))
        return x


class LitModel(nn.Module):
    """The whole. Logits are handed on in float32, as the precision plugin around that model did.

    longest: tokens for which rotations are kept.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: LitShape, packing: Packing | None, tuning: Tuning, longest: int) -> None:
        super().__init__()
        self.shape = shape
        self.lm_head = linear(
            shape.hidden, shape.rows, bias=shape.head_bias, packing=packing, tuning=tuning, target="head"
        )
        self.wte = nn.Embedding(shape.rows, shape.hidden)
        self.h = nn.ModuleList(Block(shape, packing, tuning, layer) for layer in range(shape.layers))
        self.ln_f = norm_of(shape)
        self.register_buffer("cos", torch.empty(longest, shape.rotated, dtype=torch.float32))
        self.register_buffer("sin", torch.empty(longest, shape.rotated, dtype=torch.float32))
        self.mask: Tensor | None = None

    def forward(self, ids: Tensor, *, piece: int) -> list[Tensor]:
        """ids: [batch, length]. Returns logits [batch, <= piece, rows] each, float32."""
        return [logits.to(torch.float32) for logits in self._pieces(ids, piece)]

    def next_logits(self, ids: Tensor, place: Tensor) -> Tensor:
        """ids: [1, new tokens] at `place`; keys and values go where `keep_keys` made room. Returns [1, new, rows]."""
        assert self.mask is not None
        cos, sin = self.cos.index_select(0, place), self.sin.index_select(0, place)
        logits: Tensor = self.lm_head(self._hidden(ids, cos, sin, place, self.mask.index_select(2, place)))
        return logits.to(torch.float32)

    def keep_keys(self, tokens: int) -> None:
        """Makes room for the keys and values of so many tokens, and the mask among them."""
        for block in self.h:
            block.attn.kept = KeptKeys(self.shape, tokens, self.wte.weight)
        ones = self.cos.new_ones((tokens, tokens), dtype=torch.bool)
        self.mask = torch.tril(ones).unsqueeze(0).unsqueeze(0)

    def _pieces(self, ids: Tensor, piece: int) -> list[Tensor]:
        hidden = self._hidden(ids, self.cos[: ids.size(1)], self.sin[: ids.size(1)], None, None)
        return [self.lm_head(part) for part in hidden.split(piece, dim=1)]

    def _hidden(self, ids: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.wte(ids)
        if self.shape.scaled:
            x = x * (self.shape.hidden**0.5)
        for block in self.h:
            x = block(x, cos, sin, place, mask)
        hidden: Tensor = self.ln_f(x)
        return hidden
