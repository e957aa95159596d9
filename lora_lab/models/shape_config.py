"""transformers' configuration of a model whose shape is known."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from lora_lab.schema.model import Shape

_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def shape_config(shape: Shape, **others: Any) -> Any:
    """The configuration of a model of this shape; others: further keys of it."""
    if shape.family == "gpt2":
        return GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.max_positions,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_inner=shape.mlp_size,
            tie_word_embeddings=shape.tied_embeddings,
            **others,
        )
    return _CONFIGS[shape.family](
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied_embeddings,
        **others,
    )
