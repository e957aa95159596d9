"""Arithmetic of combining adapters, layer by layer: several (A_i, B_i), weighted, become one (A, B).

Adapter i adds s_i B_i A_i to the layer's weight, A_i [r_i, in], B_i [out, r_i]; c_i = w_i s_i with w_i its weight. The
result adds B A (scaling 1). With q_i = sqrt(|c_i|):

linear       A = sum sign(c_i) q_i A_i,  B = sum q_i B_i. Equal ranks. B A holds products q_i q_j B_i A_j of different
             adapters beside the c_i B_i A_i: it is the sum of the updates only for one adapter.
cat          A = [c_1 A_1; c_2 A_2; ...],  B = [B_1, B_2, ...], so B A = sum c_i B_i A_i exactly; rank = sum r_i.
svd          The best approximation of sum c_i B_i A_i of rank max r_i (Eckart and Young 1936), B = U S, A = V^T.
ties         TIES-Merging (Yadav et al. 2023, arXiv 2306.01708, algorithm 1) of the A_i, and of the B_i, by themselves:
             trim: the `density` largest |entries| of each stay, the others become 0; elect: per entry
             gamma = sign(sum_i x_i), + where it is 0; disjoint merge: mean over {i : sign(x_i) = gamma} of v_i x_i.
             v_i = sign(c_i) q_i for A, q_i for B. The paper merges whole task vectors, one lambda for all: weights of
             1 are its lambda = 1, and equal shares divide by the number of adapters once more than its mean does.
dare_linear  DARE (Yu et al. 2023, arXiv 2311.03099, equation 3): each entry of each A_i and B_i is kept with
             probability `density` (1 - the paper's drop rate p) and divided by it, else 0; then linear. Masks of A
             and B are independent, so the expectation of B A is that of linear. The paper drops entries of the
             update itself, of which A and B are the factors.
dare_ties    The same with the election and disjoint merge of ties, without its trimming.

linear, ties and dare_* are what PEFT's `add_weighted_adapter` computes under these names (its `dare_*` with other
random numbers); ranks that differ between layers, which it does not know there, are allowed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lora_lab.errors import Problem, nearest

CombineKind = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
COMBINE_KINDS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties")
SPARSE_KINDS = ("ties", "dare_linear", "dare_ties")
RANDOM_KINDS = ("dare_linear", "dare_ties")
# Entries of different adapters are added, so their factors must have one size.
EQUAL_RANK_KINDS = ("linear", *SPARSE_KINDS)
OTHER_NAMES: Mapping[str, str] = MappingProxyType({"concatenation": "cat", "dare": "dare_linear"})

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter on one layer: a [r, in], b [out, r], and c, its weight times its scaling."""

    a: Tensor
    b: Tensor
    c: float


def number_problems(
    count: int, weights: Sequence[float], *, kind: str, density: float | None, seed: int | None
) -> list[Problem]:
    """What is wrong with the settings of a combination of `count` adapters, before any of them is there."""
    problems = []
    if kind not in COMBINE_KINDS:
        problems.append(Problem("kind", f'no such kind "{kind}"' + nearest(kind, COMBINE_KINDS)))
    if count != len(weights):
        problems.append(Problem("weights", f"expected one per adapter ({count}), got {len(weights)}"))
    problems += [Problem("weights", f"must be finite, got {weight}") for weight in weights if not math.isfinite(weight)]
    if (kind in SPARSE_KINDS) != (density is not None) or (density is not None and not 0 < density <= 1):
        rule = f"goes with kind={', '.join(SPARSE_KINDS)}, 0 < density <= 1"
        problems.append(Problem("density", f"{rule}; got kind={kind}, density={density}"))
    if (kind in RANDOM_KINDS) != (seed is not None) or (seed is not None and not 0 <= seed < 2**63):
        rule = f"goes with kind={', '.join(RANDOM_KINDS)}, 0 <= seed < 2^63"
        problems.append(Problem("seed", f"{rule}; got kind={kind}, seed={seed}"))
    return problems


def combine_factors(
    kind: CombineKind, factors: Sequence[Factors], *, density: float | None, generator: torch.Generator | None
) -> Pair:
    """A and B of the result, in the dtype of the first A; computed in float32, or float64 for such factors.

    density: for ties and dare_*. generator: for dare_*, on the CPU; it moves on by the entries of all factors.
    """
    dtype = factors[0].a.dtype
    wide = torch.promote_types(dtype, torch.float32)
    widened = [Factors(one.a.to(wide), one.b.to(wide), one.c) for one in factors]
    a, b = _combined(kind, widened, density=density, generator=generator)
    return a.to(dtype), b.to(dtype)


def _combined(
    kind: CombineKind, factors: Sequence[Factors], *, density: float | None, generator: torch.Generator | None
) -> Pair:
    if kind == "cat":
        return torch.cat([one.c * one.a for one in factors]), torch.cat([one.b for one in factors], dim=1)
    if kind == "svd":
        return _truncated(factors)
    if kind == "linear":
        return _by_side(factors, _weighted_sum)
    assert density is not None
    if kind == "ties":
        return _by_side(factors, lambda stack, v: _elected_mean(_trimmed(stack, density), v))
    assert generator is not None
    merge = _weighted_sum if kind == "dare_linear" else _elected_mean
    return _by_side(factors, lambda stack, v: merge(_dropped(stack, density, generator), v))


def _by_side(factors: Sequence[Factors], merge: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    """`merge` takes one side of all adapters, [adapters, rows, columns], and their v; first A, then B."""
    a, b = torch.stack([one.a for one in factors]), torch.stack([one.b for one in factors])
    roots = [math.sqrt(abs(one.c)) for one in factors]
    signed = [math.copysign(root, one.c) for root, one in zip(roots, factors, strict=True)]
    return merge(a, _column(signed, a)), merge(b, _column(roots, b))


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _weighted_sum(stack: Tensor, v: Tensor) -> Tensor:
    return (v * stack).sum(dim=0)


def _elected_mean(stack: Tensor, v: Tensor) -> Tensor:
    sign = torch.where(stack.sum(dim=0) >= 0, 1, -1)
    agrees = stack.sign() == sign
    return (v * stack * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _trimmed(stack: Tensor, density: float) -> Tensor:
    flat = stack.flatten(start_dim=1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, value=True)
    return torch.where(mask, flat, 0).reshape(stack.shape)


def _dropped(stack: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(stack.shape, generator=generator) < density  # on the CPU: the same masks on every device
    return torch.where(kept.to(stack.device), stack / density, 0)


def _truncated(factors: Sequence[Factors]) -> Pair:
    """SVD of the product without the product: both factors are orthogonalised, what is left is at most sum r square."""
    rows, columns = torch.cat([one.c * one.a for one in factors]), torch.cat([one.b for one in factors], dim=1)
    q_out, r_out = torch.linalg.qr(columns)
    q_in, r_in = torch.linalg.qr(rows.T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    rank = max(one.a.shape[0] for one in factors)
    return vh[:rank] @ q_in.T, q_out @ (u[:, :rank] * s[:rank])
