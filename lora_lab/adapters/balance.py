"""Auxiliary losses on what routers did, and how far experts have moved apart.

All of them take `RoutingLog.entries` while their graph is alive, look at real tokens only (the released codes count
padding as well) and return a loss without its weight: the caller multiplies, adds and logs it apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from lora_lab.adapters.expert_layer import LoraExpertsLayer
from lora_lab.adapters.routing import Routed

BalanceForm = Literal["variance_over_mean", "variance_over_squared_mean"]
KNOWLEDGE, OTHER_TASKS = 0, 1
_RELEASED_EPSILON = 1e-10


def load_balancing_loss(entries: Mapping[str, Routed], mask: torch.Tensor) -> torch.Tensor:
    """Sum over layers of the mean over a layer's routers of n * sum_i f_i P_i; a scalar in float32 (or wider).

    f_i: share of the kept places (real tokens x k) that expert i got, a constant for the gradient. P_i: mean
    probability of expert i over the real tokens, before the top k are taken. Each router's value is 1 when both are
    uniform, its gradient zero where every expert is kept (f is uniform then). Fedus et al. 2021, arXiv 2101.03961,
    eq. 4 to 6, for top k instead of top 1; the weight in MoLA's released code is 0.001.

    entries: routers by full module name; those whose names agree up to the first number are one layer.
    mask: [sequences, tokens], 1 for a real token.

    Differences: MoLA's released code puts the tokens of a layer's seven routers together before it forms f and P, so
    that routers which prefer different experts hide each other's imbalance; here each router is balanced. Both sum over
    layers, so both give the number of layers when routing is uniform, and 0.001 means the same.
    """
    layers: dict[str, list[torch.Tensor]] = {}
    for name, entry in entries.items():
        layers.setdefault(_layer_of(name), []).append(_router_balance(entry, mask.bool()))
    return torch.stack([torch.stack(losses).mean() for losses in layers.values()]).sum()


def _router_balance(entry: Routed, real: torch.Tensor) -> torch.Tensor:
    kept = (entry.weights.detach() > 0) & real.unsqueeze(-1)
    places = kept.sum(dim=(0, 1)).to(entry.probabilities.dtype)
    share = places / places.sum().clamp(min=1)
    mean = _over_real_tokens(entry.probabilities, real).sum(dim=(0, 1)) / real.sum().clamp(min=1)
    return entry.probabilities.shape[-1] * (share * mean).sum()


def _layer_of(name: str) -> str:
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def localized_balancing_loss(
    importance: torch.Tensor,
    expert_types: torch.Tensor,
    sample_types: torch.Tensor,
    *,
    delta: float,
    form: BalanceForm,
) -> torch.Tensor:
    """LoRAMoE's constraint on one router: the dispersion of Z = I * Q; a scalar (Dou et al. 2023, arXiv 2312.09979).

    importance: Q [experts, samples], weight of the expert summed over the sample's tokens (`routing_importance`).
    I[n, m] = 1 + delta where expert n and sample m are of one type, else 1 - delta.
    form: "variance_over_mean", the paper's equation, which grows with the length of the samples, or
    "variance_over_squared_mean", the released code's squared coefficient of variation, (mean^2 + 1e-10) below. The
    variance is the unbiased one in both, as in the code; a single number has none: the loss is 0.

    The constraint balances between experts of one group. Between groups it is smallest, 0, where all of Z is equal: the
    group of a sample's own type then gets (1 - delta) / 2 of its weight and the other (1 + delta) / 2. So by itself it
    pulls samples slightly away from the group of their type, not towards it as the paper describes; what separates the
    groups has to come from the language-model loss. The released run script trains with weight 0 and delta 0.

    Raises:
        ValueError: sizes that do not fit, delta outside 0 <= delta <= 1, an unknown form.
    """
    if importance.shape != (len(expert_types), len(sample_types)):
        sizes = f"{len(expert_types)} experts x {len(sample_types)} samples"
        raise ValueError(f"importance: expected {sizes}, got shape {tuple(importance.shape)}")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta: expected 0 <= delta <= 1, got {delta}")
    if form not in get_args(BalanceForm):
        raise ValueError(f"form: expected one of {', '.join(get_args(BalanceForm))}, got {form!r}")
    agree = expert_types.to(importance.device)[:, None] == sample_types.to(importance.device)[None, :]
    z = importance * (1 - delta + 2 * delta * agree.to(importance.dtype))
    if z.numel() == 1:
        return z.sum() * 0
    if form == "variance_over_mean":
        return z.var() / z.mean()
    return z.var() / (z.mean() ** 2 + _RELEASED_EPSILON)


def localized_balancing(
    entries: Mapping[str, Routed], mask: torch.Tensor, sample_types: torch.Tensor, *, delta: float, form: BalanceForm
) -> torch.Tensor:
    """`localized_balancing_loss` summed over all routers, as the released code does; a scalar.

    entries, mask: as for `load_balancing_loss`. sample_types: [sequences], KNOWLEDGE or OTHER_TASKS.

    Raises:
        ValueError: as there, or a router with an odd number of experts.
    """
    losses = [
        localized_balancing_loss(
            routing_importance(entry, mask),
            expert_types(entry.weights.shape[-1]),
            sample_types,
            delta=delta,
            form=form,
        )
        for entry in entries.values()
    ]
    return torch.stack(losses).sum()


def routing_importance(entry: Routed, mask: torch.Tensor) -> torch.Tensor:
    """Q [experts, samples]: the weight of each expert, summed over the real tokens of each sequence."""
    return _over_real_tokens(entry.weights, mask.bool()).sum(dim=1).T


def expert_types(experts: int) -> torch.Tensor:
    """[experts]: the first half OTHER_TASKS (1), the second KNOWLEDGE (0), the order of LoRAMoE's released code.

    Raises:
        ValueError: the number is odd, or 0.
    """
    if experts < 2 or experts % 2:
        raise ValueError(f"num_experts: expected an even number, for two groups of one size, got {experts}")
    return torch.tensor([OTHER_TASKS] * (experts // 2) + [KNOWLEDGE] * (experts // 2))


def expert_distances(layer: LoraExpertsLayer, adapter_name: str) -> float | None:
    """Mean over pairs i < j of the Frobenius norm of (alpha / r) * (B_i A_i - B_j A_j); None for one expert.

    The statistic of MoLA's layer redundancy (Gao et al. 2024, arXiv 2402.08562). No out x in matrix is formed:
    <B_i A_i, B_j A_j> is the sum of (B_i^T B_j) * (A_i A_j^T), r x r numbers, in float64.
    """
    down, up = layer.lora_experts_A[adapter_name].detach(), layer.lora_experts_B[adapter_name].detach()
    experts, rank, _ = down.shape
    if experts == 1:
        return None
    a = down.double().flatten(0, 1)
    b = up.double().transpose(1, 2).flatten(0, 1)
    blocks = ((a @ a.T) * (b @ b.T)).unflatten(1, (experts, rank)).unflatten(0, (experts, rank))
    inner = blocks.sum(dim=(1, 3))
    squares = inner.diagonal()[:, None] + inner.diagonal()[None, :] - 2 * inner
    i, j = torch.triu_indices(experts, experts, offset=1, device=inner.device)
    # Rounding can take the distance of equal experts below zero.
    return float(squares[i, j].clamp(min=0).sqrt().mean() * abs(layer.scaling[adapter_name]))


def _over_real_tokens(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~real.unsqueeze(-1), 0)
