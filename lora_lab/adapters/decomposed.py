"""LoRA that starts from a decomposition of the weight itself: PiSSA and OLoRA, with the base left as it is.

Both take s B0 A0 out of the weight and train B and A from there: y = (W - s B0 A0) x + s B A x.

pissa (Meng et al. 2024, arXiv 2404.02948, equations 2 to 4): W = U S V^T; B0 = U_r sqrt(S_r / s), A0 = sqrt(S_r / s)
V_r^T.
olora (Buyukakyuz 2024, arXiv 2406.01775): W = Q R; B0 = Q_r, A0 = R_r.

PEFT overwrites the weight by its residual, which is rounded on a bf16 base. Here W stays and -s B0 A0 is a second,
frozen adapter (`start_name`, without dropout): the same function, exact in bf16 too, on a base that others may share,
and saved as what it is: a LoRA of rank 2r on the untouched base, A = [A; A0], B = [B, -B0]. It costs one more small
product in each layer. PEFT's OLoRA fails on Conv1D, whose weight it does not transpose; here both work there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lab.errors import InputError, Problem


def start_name(name: str) -> str:
    """The adapter that holds what is taken out of the weights for adapter `name`; the two belong together."""
    return f"{name}_start"


def start_from_weights(model: Any, name: str, config: LoraConfig, *, kind: str) -> None:
    """Sets adapter `name` (attached as a plain LoRA) to the decomposition of its base, and adds what is taken out.

    Where `name` is active, what is taken out is too; of a further adapter, not yet active, both have to be activated.

    Raises:
        InputError: a target that is no linear layer, or is narrower than its rank.
    """
    problems = [problem for layer_name, layer in _layers(model, name) for problem in _problems(layer_name, layer, name)]
    if problems:
        raise InputError(problems)
    start, is_active = start_name(name), name in model.active_adapters
    model.add_adapter(start, LoraConfig(**{**config.to_dict(), "lora_dropout": 0.0}))
    for _, layer in _layers(model, name):
        a, b = initial_pair(_weight(layer), kind=kind, rank=layer.r[name], scaling=layer.scaling[name])
        for adapter, sign in ((name, 1), (start, -1)):
            with torch.no_grad():
                layer.lora_A[adapter].weight.copy_(a)
                layer.lora_B[adapter].weight.copy_(sign * b)
    if is_active:
        model.base_model.set_adapter([name, start])
    model.base_model.set_requires_grad(start, requires_grad=False)


def initial_pair(weight: Tensor, *, kind: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and B0 [out, rank] of a weight [out, in]; computed in float32, or float64 for such a weight."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if kind == "olora":
        q, r = torch.linalg.qr(wide)
        return r[:rank], q[:, :rank]
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    root = torch.sqrt(s[:rank] / scaling)
    return root[:, None] * vh[:rank], u[:, :rank] * root


def as_plain_lora(
    config: LoraConfig, weights: dict[str, Tensor], start: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and tensors (named as PEFT does) of the one LoRA of rank 2r that adapter and start are together."""
    joined = {key: torch.cat([tensor, start[key]], dim=0 if "lora_A" in key else 1) for key, tensor in weights.items()}
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: 2 * alpha for key, alpha in config.alpha_pattern.items()}
    return config, joined


def _layers(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    for layer_name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A):
            yield layer_name, module


def _problems(layer_name: str, layer: Any, name: str) -> list[Problem]:
    base = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)):
        return [Problem("target", f"{layer_name}: pissa and olora decompose linear layers only")]
    narrow = min(base.weight.shape)
    if layer.r[name] > narrow:
        return [Problem("rank", f"must be <= {narrow}, the smaller side of {layer_name}, got {layer.r[name]}")]
    return []


def _weight(layer: Any) -> Tensor:
    """The weight as [out, in], however it is kept."""
    base = layer.get_base_layer()
    weight: Tensor = base.weight.detach()
    return weight.T if isinstance(base, Conv1D) else weight
