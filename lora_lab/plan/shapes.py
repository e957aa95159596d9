"""The modules of a decoder-only transformer from its shape alone: names, sizes, parameter counts; no weights.

Names and sizes equal those of the transformers implementation (a parity test builds each family and compares).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lora_lab.errors import InputError, Problem
from lora_lab.schema.model import Shape

ModuleKind = Literal["linear", "conv1d", "embedding", "norm"]


@dataclass(frozen=True, slots=True)
class Module:
    """A module that holds parameters.

    parts: the parts of a target it belongs to; GPT-2's c_attn is query, key and value in one. `position` (learned
    positions) and `norm` are parts that no target names. An embedding maps in_features = rows of its table to
    out_features = hidden size; a norm has in_features = out_features; conv1d is GPT-2's transposed linear layer.
    """

    name: str
    parts: tuple[str, ...]
    in_features: int
    out_features: int
    bias: bool
    kind: ModuleKind

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        if self.kind == "norm":
            return self.in_features * (2 if self.bias else 1)
        return self.in_features * self.out_features + (self.out_features if self.bias else 0)


@lru_cache(maxsize=256)
def modules_of(shape: Shape) -> tuple[Module, ...]:
    """Every module with parameters, in the model's own order. The head is listed even where it shares its weight."""
    build = _gpt2_modules if shape.family == "gpt2" else _llama_modules
    return tuple(build(shape))


def is_tied(shape: Shape, *, tie_embeddings: bool | None) -> bool:
    """Whether head and token embedding are one weight in the model as loaded; None leaves it as the model has it.

    Raises:
        InputError: for tie_embeddings=true on a model whose two weights differ: tying would throw one away.
    """
    if tie_embeddings and not shape.tied_embeddings:
        raise InputError(
            Problem(
                "model.tie_embeddings",
                "true is not possible: head and embedding of this model are two different weights; use null",
            )
        )
    return shape.tied_embeddings if tie_embeddings is None else tie_embeddings


@lru_cache(maxsize=256)
def total_parameters(shape: Shape, *, tie_embeddings: bool | None) -> int:
    """Parameters of the base model; tie_embeddings=false adds a copy of vocab_size x hidden_size to a tied one."""
    tied = is_tied(shape, tie_embeddings=tie_embeddings)
    return sum(module.parameters for module in modules_of(shape) if not (tied and module.parts == ("head",)))


def _llama_modules(shape: Shape) -> Iterator[Module]:
    """Llama, Mistral and Qwen2 differ in one thing that is counted: Qwen2 has biases on query, key and value."""
    hidden, mlp = shape.hidden_size, shape.mlp_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    bias = shape.family == "qwen2"
    yield Module("model.embed_tokens", ("embedding",), shape.vocab_size, hidden, False, "embedding")
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        yield Module(f"{prefix}self_attn.q_proj", ("query",), hidden, query, bias, "linear")
        yield Module(f"{prefix}self_attn.k_proj", ("key",), hidden, key, bias, "linear")
        yield Module(f"{prefix}self_attn.v_proj", ("value",), hidden, key, bias, "linear")
        yield Module(f"{prefix}self_attn.o_proj", ("projection",), query, hidden, False, "linear")
        yield Module(f"{prefix}mlp.gate_proj", ("mlp",), hidden, mlp, False, "linear")
        yield Module(f"{prefix}mlp.up_proj", ("mlp",), hidden, mlp, False, "linear")
        yield Module(f"{prefix}mlp.down_proj", ("mlp",), mlp, hidden, False, "linear")
        yield Module(f"{prefix}input_layernorm", ("norm",), hidden, hidden, False, "norm")
        yield Module(f"{prefix}post_attention_layernorm", ("norm",), hidden, hidden, False, "norm")
    yield Module("model.norm", ("norm",), hidden, hidden, False, "norm")
    yield Module("lm_head", ("head",), hidden, shape.vocab_size, False, "linear")


def _gpt2_modules(shape: Shape) -> Iterator[Module]:
    hidden, mlp = shape.hidden_size, shape.mlp_size
    yield Module("transformer.wte", ("embedding",), shape.vocab_size, hidden, False, "embedding")
    yield Module("transformer.wpe", ("position",), shape.max_positions, hidden, False, "embedding")
    for layer in range(shape.num_layers):
        prefix = f"transformer.h.{layer}."
        yield Module(f"{prefix}ln_1", ("norm",), hidden, hidden, True, "norm")
        yield Module(f"{prefix}attn.c_attn", ("query", "key", "value"), hidden, 3 * hidden, True, "conv1d")
        yield Module(f"{prefix}attn.c_proj", ("projection",), hidden, hidden, True, "conv1d")
        yield Module(f"{prefix}ln_2", ("norm",), hidden, hidden, True, "norm")
        yield Module(f"{prefix}mlp.c_fc", ("mlp",), hidden, mlp, True, "conv1d")
        yield Module(f"{prefix}mlp.c_proj", ("mlp",), mlp, hidden, True, "conv1d")
    yield Module("transformer.ln_f", ("norm",), hidden, hidden, True, "norm")
    yield Module("lm_head", ("head",), hidden, shape.vocab_size, False, "linear")
