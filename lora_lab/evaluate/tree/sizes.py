"""How large a pass and its rows are, from the shape of a model and the memory that is free."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from lora_lab.evaluate.tree.passes import Budget, Costs

# More tokens make a matrix product no faster. SmolLM2-135M on two cores reads 530 nodes per second with 512, 610 with
# 1,024 and with 2,048; the figure for CUDA is a guess.
_MOST_TOKENS = {"cpu": 1024, "cuda": 8192}
_FEWEST_TOKENS = 64
# A pass may take this share of what is free.
_MEMORY_SHARE = 0.25
# Attention under a mask, against its arithmetic at the speed of the linear layers: measured with SDPA on a CPU, where
# SmolLM2-135M spends 12 % of a pass of rows of 192 nodes behind 172 kept tokens in it.
_SLOWER = 1.25
# Rows as long as attention costs at most this share of the linear layers.
_ATTENTION_SHARE = 0.08
# A pass costs as much as this many tokens: calls from Python, and products too small for the processor.
_OVERHEAD = 32.0


def costs_of(model: nn.Module) -> Costs:
    """With d attended channels per layer, L layers and p weights of linear layers: one pair is 4 d L operations, one
    token 2 p."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", None)
    # Where a model has no such heads, no tree is valid for it, and the figure counts for nothing.
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 1)
    channels = int((heads or config.hidden_size) * size)
    return Costs(
        attention=_SLOWER * 2 * config.num_hidden_layers * channels / _linear_weights(model), overhead=_OVERHEAD
    )


def budget_of(model: nn.Module, chunk_tokens: int | None) -> Budget:
    """The given tokens per pass, or as many as are useful on the model's device and fit into a quarter of what is free,
    halved from the most; so two runs on one machine differ only where memory is short. Recorded in the result.
    """
    if chunk_tokens is None:
        device: torch.device = model.device  # type: ignore[assignment]
        chunk_tokens = _MOST_TOKENS.get(device.type, _MOST_TOKENS["cuda"])
        room = _MEMORY_SHARE * _free_bytes(device)
        while chunk_tokens > _FEWEST_TOKENS and chunk_tokens * _bytes_per_token(model) > room:
            chunk_tokens //= 2
    row_tokens = int(_ATTENTION_SHARE / costs_of(model).attention)
    return Budget(chunk_tokens, min(chunk_tokens, max(_FEWEST_TOKENS, row_tokens)))


def _linear_weights(model: nn.Module) -> int:
    """Weights that a token is multiplied with in the layers; 4-bit weights are counted, not their bytes."""
    apart = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[operator]
    total = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if id(module) in apart or not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            continue
        rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
        total += rows * columns if rows and columns else weight.numel()
    return max(total, 1)


def _bytes_per_token(model: nn.Module) -> int:
    """What one layer holds at once, roughly: some twelve hidden states, the MLP's, and logits with their softmax."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    hidden = int(config.hidden_size)
    mlp = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    size: int = model.dtype.itemsize  # type: ignore[assignment]
    return size * (12 * hidden + 4 * mlp) + int(config.vocab_size) * size


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)
