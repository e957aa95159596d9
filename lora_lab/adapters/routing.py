"""What the routers of mixtures of experts did: a log for losses, and statistics over tokens, sequences and labels.

A router layer is any PEFT layer with `routing_name` (its module's full name) and `routing_log` (None, or where it notes
the probabilities and weights of every forward pass). Nothing here depends on the kind of expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True, slots=True)
class Routed:
    """One router on one batch, [sequences, tokens, experts], with its graph: gradients flow into the router.

    probabilities: the softmax over all experts. weights: what the experts' outputs are multiplied by, which differs
    where only the top k are kept.
    """

    probabilities: torch.Tensor
    weights: torch.Tensor


class RoutingLog:
    """Collects what the routers of one adapter do between `open` and `close`.

    Close it before the backward pass: a layer under gradient checkpointing is computed again there, and would note the
    same twice. Entries stay until `open` or `clear`. A copy (of the model that holds it) starts closed and empty, as
    tensors with a graph cannot be copied.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Routed] = {}
        self.mask: torch.Tensor | None = None
        self.is_open = False

    def __deepcopy__(self, memo: dict[int, object]) -> RoutingLog:
        return RoutingLog()

    def open(self, attention_mask: torch.Tensor) -> None:
        """Forgets the last batch and starts on this one; attention_mask [sequences, tokens], 1 for a real token."""
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask: expected [sequences, tokens], got shape {tuple(attention_mask.shape)}")
        self.clear()
        self.mask = attention_mask.bool()
        self.is_open = True

    def close(self) -> None:
        """Stops collecting; the entries stay."""
        self.is_open = False

    def clear(self) -> None:
        """Stops collecting and lets go of the entries and their graph."""
        self.entries = {}
        self.mask = None
        self.is_open = False

    def note(self, name: str, probabilities: torch.Tensor, weights: torch.Tensor) -> None:
        """Keeps what router `name` did if open; both [sequences, tokens, experts] of the batch it was opened for.

        No operation is done on them: a recomputation in the backward pass, which notes nothing, has to match.

        Raises:
            ValueError: another batch than that of `open`, or a router that is called twice.
        """
        if not self.is_open or self.mask is None:
            return
        if probabilities.shape[:-1] != self.mask.shape:
            rule = f"routed {tuple(probabilities.shape[:-1])} tokens, the log is open for {tuple(self.mask.shape)}"
            raise ValueError(f"{name}: {rule}")
        if name in self.entries:
            raise ValueError(f"{name}: noted twice; close the log after one forward pass, before the backward pass")
        self.entries[name] = Routed(probabilities, weights)


def set_routing_log(model: nn.Module, log: RoutingLog | None, adapter_name: str) -> None:
    """Makes all routers of an adapter note into `log`, or into none; a layer has one log, for one of its adapters.

    Raises:
        ValueError: the adapter has no router in this model.
    """
    layers: list[Any] = [module for module in model.modules() if _routes(module, adapter_name)]
    if not layers:
        raise ValueError(f'no layer of adapter "{adapter_name}" has a router')
    for layer in layers:
        layer.routing_log = log
        layer.routing_adapter = None if log is None else adapter_name


def _routes(module: Any, adapter_name: str) -> bool:
    if not isinstance(module, BaseTunerLayer) or not hasattr(module, "routing_name"):
        return False
    return adapter_name in module._get_available_adapters()


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """One router over the real tokens it has seen.

    entropy: mean over tokens of -sum p log p, in nats, of the probabilities before the top k are taken.
    relative_entropy: entropy / log n, 1 for a router that prefers nobody; None for a single expert.
    load: mean weight of each expert; sums to 1. chosen: share of the tokens that give it any weight; sums to the top k
    (every entry is 1 where all experts are weighted). first: share of the tokens that it has the largest probability
    for; sums to 1. top2_mass: mean of the sum of the two largest probabilities (1 with fewer than three experts).
    """

    tokens: int
    entropy: float
    relative_entropy: float | None
    load: tuple[float, ...]
    chosen: tuple[float, ...]
    first: tuple[float, ...]
    top2_mass: float


class RoutingTotals:
    """Adds up what routers did over any number of batches; padding counts nowhere.

    With `keep_sequences` it also keeps, on the CPU, the mean probabilities of every sequence: sequences x experts
    numbers per router. Sums are float64 on the entries' device, which `add` does not wait for otherwise.
    """

    def __init__(self, *, keep_sequences: bool) -> None:
        self._keep_sequences = keep_sequences
        self._sums: dict[str, torch.Tensor] = {}
        self._sequences: dict[str, list[NDArray[np.float64]]] = {}

    def add(self, entries: Mapping[str, Routed], mask: torch.Tensor) -> None:
        """Adds a batch: `log.entries` (or some of them), and its mask [sequences, tokens], 1 for a real token.

        Raises:
            ValueError: sequences are kept and one has no real token, so no mean.
        """
        real = mask.bool()
        for name, entry in entries.items():
            found = _batch_sums(entry, real)
            self._sums[name] = self._sums[name] + found if name in self._sums else found
            if self._keep_sequences:
                self._sequences.setdefault(name, []).append(_sequence_means(entry, real))

    @property
    def sums(self) -> Mapping[str, torch.Tensor]:
        """All that was added up, by router: what `put_back` takes. Without what is kept of sequences."""
        return self._sums

    def put_back(self, sums: Mapping[str, torch.Tensor], *, device: torch.device) -> None:
        """Forgets all batches and goes on from copies of these sums, on the device of the batches to come."""
        self.clear()
        self._sums = {name: one.to(device, copy=True) for name, one in sums.items()}

    def clear(self) -> None:
        """Forgets all batches."""
        self._sums.clear()
        self._sequences.clear()

    def statistics(self) -> dict[str, RoutingStatistics]:
        """Of every router that has seen a real token, by its name."""
        rows = {name: sums.cpu() for name, sums in self._sums.items()}
        return {name: _statistics(row) for name, row in rows.items() if row[0] > 0}

    def sequence_probabilities(self) -> dict[str, NDArray[np.float64]]:
        """[sequences, experts] by router, in the order they were added: mean probabilities over the real tokens."""
        return {name: np.concatenate(batches) for name, batches in self._sequences.items()}


def _batch_sums(entry: Routed, real: torch.Tensor) -> torch.Tensor:
    """Sums over the real tokens: 1, entropy, top-2 mass, then n each of weight, chosen and first; [3 + 3n]."""
    p, weights = entry.probabilities.detach().double(), entry.weights.detach().double()
    two_largest = p.topk(min(2, p.shape[-1]), dim=-1).values.sum(-1)
    single = torch.stack([torch.ones_like(two_largest), torch.special.entr(p).sum(-1), two_largest], dim=-1)
    first = nn.functional.one_hot(p.argmax(-1), p.shape[-1])
    per_token = torch.cat([single, weights, (weights > 0).double(), first.double()], dim=-1)
    # Not a product with the mask: padding may hold NaN.
    return per_token.masked_fill(~real.unsqueeze(-1), 0).sum(dim=(0, 1))


def _statistics(sums: torch.Tensor) -> RoutingStatistics:
    (tokens, entropy, top2_mass), load, chosen, first = sums[:3].tolist(), *sums[3:].chunk(3)
    most = math.log(len(load))
    return RoutingStatistics(
        tokens=int(tokens),
        entropy=entropy / tokens,
        relative_entropy=entropy / tokens / most if most else None,
        load=tuple((load / tokens).tolist()),
        chosen=tuple((chosen / tokens).tolist()),
        first=tuple((first / tokens).tolist()),
        top2_mass=top2_mass / tokens,
    )


def _sequence_means(entry: Routed, real: torch.Tensor) -> NDArray[np.float64]:
    counts = real.sum(dim=1, keepdim=True)
    if not counts.all():
        raise ValueError("a sequence without a real token has no mean probabilities")
    p = entry.probabilities.detach().double().masked_fill(~real.unsqueeze(-1), 0)
    means: NDArray[np.float64] = (p.sum(dim=1) / counts).cpu().numpy()
    return means


@dataclass(frozen=True, slots=True)
class Specialization:
    """How much routing follows the labels, beside the same with shuffled labels.

    statistic: variance between labels of the mean load. shuffled_mean, shuffled_quantile_95: of that statistic over the
    permutations. p_value: (1 + permutations that reach the statistic) / (1 + permutations).
    """

    statistic: float
    shuffled_mean: float
    shuffled_quantile_95: float
    p_value: float


def routing_specialization(
    loads: NDArray[np.floating[Any]] | Sequence[NDArray[np.floating[Any]]],
    labels: Sequence[object],
    *,
    permutations: int,
    seed: int,
) -> Specialization:
    """Permutation test of the claim that experts specialize on tasks (Zadouri et al. 2023, arXiv 2309.05444).

    loads: one row per sequence, [sequences, experts], or a list of such arrays, one per router (as
    `RoutingTotals.sequence_probabilities` gives them). labels: one per sequence, of at least two kinds.
    The statistic is the mean over experts (of all routers) of sum_g (n_g / N) (mean_g - mean)^2 over labels g with n_g
    of the N sequences. It is never zero, not for shuffled labels either, hence the comparison. Labels are shuffled over
    whole sequences, as the tokens of one sequence are not independent.

    Raises:
        ValueError: sizes that do not fit, fewer than two kinds of labels, no permutation, numbers that are not finite.
    """
    arrays = [loads] if isinstance(loads, np.ndarray) else list(loads)
    table = np.concatenate([np.asarray(array, dtype=np.float64) for array in arrays], axis=1)
    kinds = list(dict.fromkeys(labels))
    if len(labels) != len(table):
        raise ValueError(f"labels: expected one per sequence ({len(table)}), got {len(labels)}")
    if len(kinds) < 2:
        raise ValueError(f"labels: expected at least 2 kinds, got {len(kinds)}")
    if permutations < 1:
        raise ValueError(f"permutations: expected >= 1, got {permutations}")
    if not np.isfinite(table).all():
        raise ValueError("loads: not all are finite")
    table -= table.mean(axis=0)
    codes = np.array([kinds.index(label) for label in labels])
    statistic = _between_variance(table, codes, len(kinds))
    random = np.random.default_rng(seed)
    shuffled = np.array([_between_variance(table, random.permutation(codes), len(kinds)) for _ in range(permutations)])
    reached = int((shuffled >= statistic * (1 - 1e-9)).sum())  # the same groups sum up in another order
    return Specialization(
        statistic=statistic,
        shuffled_mean=float(shuffled.mean()),
        shuffled_quantile_95=float(np.quantile(shuffled, 0.95)),
        p_value=(1 + reached) / (1 + permutations),
    )


def _between_variance(centred: NDArray[np.float64], codes: NDArray[np.intp], kinds: int) -> float:
    belongs = np.eye(kinds)[codes]
    sums = belongs.T @ centred
    return float((sums**2 / belongs.sum(axis=0)[:, None]).sum(axis=0).mean() / len(centred))
