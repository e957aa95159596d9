"""Tiny random causal LMs of many architectures, and random request sets, for the tests of tree scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from lora_lab.evaluate.tree.token_tree import ScoredRow

VOCABULARY = 300
CONTEXT = 64
# Weights this large, instead of 0.02, make attention matter: a wrong mask then shows in every log-probability.
DEVIATION = 0.15
_MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_NEW = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    **_MARKS,
}
_HEADED = {**_NEW, "head_dim": 8}
_GPT = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, **_MARKS}
_BIG_SCIENCE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_MARKS}
_NEO = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, **_MARKS}
_NEOX = {key: value for key, value in _NEW.items() if key != "num_key_value_heads"}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": CONTEXT // 2,
}

# Name -> (class of the configuration, its settings). Windows are those of the context.
VALID: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT),
    "opt": ("OPTConfig", {**_NEOX, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "llama": ("LlamaConfig", _NEW),
    "qwen2": ("Qwen2Config", _NEW),
    "qwen3": ("Qwen3Config", _HEADED),
    "mistral": ("MistralConfig", {**_NEW, "sliding_window": CONTEXT}),
    "phi": ("PhiConfig", _NEW),
    "phi3": ("Phi3Config", _NEW),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "mixtral": ("MixtralConfig", {**_NEW, "num_local_experts": 4}),
    "cohere": ("CohereConfig", _NEW),
    "olmo2": ("Olmo2Config", _NEW),
    "granite": ("GraniteConfig", _NEW),
    "stablelm": ("StableLmConfig", _NEW),
    "glm4": ("Glm4Config", _HEADED),
    "smollm3": ("SmolLM3Config", _NEW),
    "gemma": ("GemmaConfig", _HEADED),
    "gemma2": ("Gemma2Config", {**_HEADED, "sliding_window": CONTEXT}),
    "gemma3_text": ("Gemma3TextConfig", {**_HEADED, "sliding_window": CONTEXT}),
    "falcon_rotary": ("FalconConfig", {**_BIG_SCIENCE, "max_position_embeddings": CONTEXT, "alibi": False}),
    "starcoder2": ("Starcoder2Config", {**_NEW, "sliding_window": CONTEXT}),
    "gpt_oss": ("GptOssConfig", {**_HEADED, **_EXPERTS, "sliding_window": CONTEXT, "rope_parameters": _YARN}),
    "llama4_text": (
        "Llama4TextConfig",
        {
            **_HEADED,
            "attention_chunk_size": CONTEXT,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "attn_temperature_tuning": False,
        },
    ),
}
# The key that holds the window of each family that has one.
WINDOWED: Mapping[str, str] = {
    "mistral": "sliding_window",
    "starcoder2": "sliding_window",
    "gemma2": "sliding_window",
    "gemma3_text": "sliding_window",
    "gpt_oss": "sliding_window",
    "llama4_text": "attention_chunk_size",
}
# What no length makes valid.
INVALID: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeoConfig",
        {**_NEO, "attention_types": [[["global", "local"], 1]], "window_size": CONTEXT},
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_MARKS}),
    "falcon_alibi": ("FalconConfig", {**_BIG_SCIENCE, "alibi": True}),
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "jamba": (
        "JambaConfig",
        {**_NEW, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4},
    ),
    "qwen3_next": ("Qwen3NextConfig", {**_HEADED, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]}),
    "lfm2": ("Lfm2Config", {**_NEW, "layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_NEW, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": CONTEXT},
    ),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": CONTEXT},
    ),
}


def tiny_model(
    kind: str,
    settings: Mapping[str, Any],
    *,
    make: Callable[..., Any] = AutoModelForCausalLM.from_config,
    **changes: Any,
) -> Any:
    """A float32 model in evaluation mode, every matrix normal with `DEVIATION`, the same at every call."""
    config = getattr(transformers, kind)(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, DEVIATION)
    return model


def random_rows(
    seed: int, count: int, *, longest: int, letters: int = VOCABULARY, branching: float = 0.3
) -> list[ScoredRow]:
    """`count` requests of 1 to `longest` inputs. Each continues a prefix of an earlier one or starts anew; some repeat
    an input with other targets, or a request as a whole."""
    random = Random(seed)
    rows: list[ScoredRow] = []
    while len(rows) < count:
        start: tuple[int, ...] = ()
        if rows and random.random() > branching / 2:
            start = random.choice(rows).tokens
            start = start[: random.randint(0, len(start))] if random.random() < branching * 2 else start
        room = longest - len(start)
        more = tuple(random.randrange(letters) for _ in range(random.randint(0, room)))
        tokens = start + more or (random.randrange(letters),)
        scored = random.randint(1, min(5, len(tokens)))
        targets = (*tokens[len(tokens) - scored + 1 :], random.randrange(letters))
        rows.append(ScoredRow(tokens, targets))
        if random.random() < 0.1:
            rows.append(rows[-1])
    return rows[:count]
