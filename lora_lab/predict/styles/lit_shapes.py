"""Shapes of models as lit-gpt ran them: vocabulary padded, head never tied, blocks wired its way.

Source of the facts: the models' own configuration files, and lit-gpt's table of configurations (lit_gpt/config.py at
commits 8641822 and 967cfda1: how far vocabularies are padded, where attention and MLP share a norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
Mlp = Literal["gated_silu", "gated_gelu", "plain"]


@dataclass(frozen=True, slots=True)
class LitShape:
    """rows: of the embedding and of the head, the vocabulary as it is padded. rotary: the part of a head that is rotated.

    parallel: attention and MLP both read the block's input; one_norm: even through the same norm. bias: of every product
    in a block; joint_bias: only of queries, keys and values. scaled: embeddings are multiplied by a constant.
    """

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    rows: int
    norm: Norm
    mlp: Mlp
    rotary: float = 1.0
    parallel: bool = False
    one_norm: bool = False
    bias: bool = False
    joint_bias: bool = False
    head_bias: bool = False
    scaled: bool = False

    @property
    def rotated(self) -> int:
        """Elements of each head that are rotated."""
        return int(self.rotary * self.head_size)

    @property
    def joint_widths(self) -> tuple[int, int, int]:
        """Outputs of the one product that makes queries, keys and values."""
        key_values = self.key_value_heads * self.head_size
        return self.heads * self.head_size, key_values, key_values


def _llama(layers: int, hidden: int, heads: int, intermediate: int, *, groups: int = 0, rows: int = 32000) -> LitShape:
    return LitShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=groups or heads,
        head_size=hidden // heads,
        intermediate=intermediate,
        rows=rows,
        norm="rms",
        mlp="gated_silu",
    )


def _gemma(layers: int, hidden: int, heads: int, intermediate: int, *, groups: int) -> LitShape:
    return LitShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=groups,
        head_size=256,
        intermediate=intermediate,
        rows=256000,
        norm="rms",
        mlp="gated_gelu",
        scaled=True,
    )


def _neox(layers: int, hidden: int, heads: int, rows: int, *, rotary: float, one_norm: bool, groups: int = 0) -> LitShape:
    return LitShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=groups or heads,
        head_size=hidden // heads,
        intermediate=4 * hidden,
        rows=rows,
        norm="layer",
        mlp="plain",
        rotary=rotary,
        parallel=True,
        one_norm=one_norm,
        bias=groups == 0,
        head_bias=groups == 0 and one_norm,
    )


PUBLISHED: Mapping[str, LitShape] = {
    "phi-1.5": _neox(24, 2048, 32, 51200, rotary=0.5, one_norm=True),
    "phi-2": _neox(32, 2560, 32, 51200, rotary=0.4, one_norm=True),
    "stablelm-base-alpha-3b": _neox(16, 4096, 32, 50688, rotary=0.25, one_norm=False),
    "falcon-7b": _neox(32, 4544, 71, 65024, rotary=1.0, one_norm=True, groups=1),
    "falcon-40b": _neox(60, 8192, 128, 65024, rotary=1.0, one_norm=False, groups=8),
    "tiny-llama": _llama(22, 2048, 32, 5632, groups=4),
    "llama-2-7b": _llama(32, 4096, 32, 11008),
    "llama-2-13b": _llama(40, 5120, 40, 13824),
    "llama-2-70b": _llama(80, 8192, 64, 28672, groups=8),
    "codellama-34b": _llama(48, 8192, 64, 22016, groups=8),
    "mistral-7b": _llama(32, 4096, 32, 14336, groups=8),
    "llama-3-8b": _llama(32, 4096, 32, 14336, groups=8, rows=128256),
    "llama-3.2-1b": _llama(16, 2048, 32, 8192, groups=8, rows=128256),
    "llama-3.2-3b": _llama(28, 3072, 24, 8192, groups=8, rows=128256),
    "gemma-2b": _gemma(18, 2048, 8, 16384, groups=1),
    "gemma-7b": _gemma(28, 3072, 16, 24576, groups=16),
}
