"""What each method adds to a model, in parameters, by arithmetic from the shape.

A LoRA pair on a layer with `in` inputs and `out` outputs holds rank (in + out) numbers (Hu et al. 2021); on an
embedding in = vocabulary and out = hidden size, as in PEFT. One row per method in the table at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_lab.errors import InputError, Problem
from lora_lab.plan.layer_groups import layer_of, per_layer
from lora_lab.plan.shapes import Module
from lora_lab.plan.targets import LAST_OF_MLP, name_matches, selected_modules
from lora_lab.schema.model import Shape
from lora_lab.schema.trial import Trial


class Added(NamedTuple):
    """adapter and router: trained; frozen: constants that PEFT counts as parameters."""

    adapter: int
    router: int
    frozen: int


def added_parameters(trial: Trial, shape: Shape) -> Added:
    """What the method of a trial adds; raises InputError where a target, rank or list does not fit the shape."""
    return _ADDED[trial.method.kind](trial, shape)


def rank_of_layers(trial: Trial, *, num_layers: int) -> Mapping[int, int]:
    """Layer -> rank, where `method.rank_factors` gives groups of layers ranks of their own; empty without factors.

    Raises:
        InputError: a factor that makes no whole rank >= 1; more factors than layers.
    """
    factors = getattr(trial.method, "rank_factors", ())
    # 50 x 0.14 is 7.000000000000001.
    ranks = [round(trial.rank * factor, 9) for factor in factors]
    problems = [
        Problem("method.rank_factors", f"rank {trial.rank} x {factor:g} = {rank:g} is no whole rank >= 1")
        for factor, rank in zip(factors, ranks, strict=True)
        if rank < 1 or rank != int(rank)
    ]
    if problems:
        raise InputError(problems)
    if not factors:
        return {}
    return dict(enumerate(map(int, per_layer(ranks, num_layers, where="method.rank_factors"))))


def _modules(trial: Trial) -> tuple[Module, ...]:
    modules = selected_modules(trial)
    assert modules is not None  # the shape is known
    return modules


def _inner_modules(trial: Trial) -> list[tuple[int, Module]]:
    """Layer and module; raises InputError for one that lies in no decoder layer, as a head named by its module."""
    found = []
    for module in _modules(trial):
        layer = layer_of(module.name)
        if layer is None:
            rule = f"method={trial.method.kind} works inside the decoder layers; {module.name} is in none"
            raise InputError(Problem("target", rule))
        found.append((layer, module))
    return found


def _linear_modules(trial: Trial) -> tuple[Module, ...]:
    modules = _modules(trial)
    for module in modules:
        if module.kind == "embedding":
            rule = f"method={trial.method.kind} decomposes linear layers only, {module.name} is an embedding"
            raise InputError(Problem("target", rule))
    return modules


@lru_cache(maxsize=1024)
def _widths(modules: tuple[Module, ...]) -> tuple[int, int]:
    return sum(module.in_features for module in modules), sum(module.out_features for module in modules)


def _pairs(trial: Trial, shape: Shape) -> int:
    modules, ranks = _modules(trial), rank_of_layers(trial, num_layers=shape.num_layers)
    if max(ranks.values(), default=0) > shape.hidden_size:
        rule = f"rank {max(ranks.values())} is beyond the hidden size {shape.hidden_size}"
        raise InputError(Problem("method.rank_factors", rule))
    if not ranks:
        return trial.rank * sum(_widths(modules))
    layers = [(module, layer_of(module.name)) for module in modules]
    return sum(
        (trial.rank if layer is None else ranks[layer]) * (module.in_features + module.out_features)
        for module, layer in layers
    )


def _lora(trial: Trial, shape: Shape) -> Added:
    return Added(_pairs(trial, shape), 0, 0)


def _decomposed(trial: Trial, shape: Shape) -> Added:
    """The frozen start that is subtracted is as large as the adapter; no rank may be above a matrix's smaller side."""
    modules, ranks = _linear_modules(trial), rank_of_layers(trial, num_layers=shape.num_layers)
    for module in modules:
        layer, narrow = layer_of(module.name), min(module.in_features, module.out_features)
        rank = trial.rank if layer is None else ranks.get(layer, trial.rank)
        if rank > narrow:
            raise InputError(Problem("rank", f"must be <= {narrow}, the smaller side of {module.name}, got {rank}"))
    pairs = _pairs(trial, shape)
    return Added(pairs, 0, pairs)


def _dora(trial: Trial, shape: Shape) -> Added:
    """One magnitude per output more (Liu et al. 2024)."""
    return Added(_pairs(trial, shape) + _widths(_modules(trial))[1], 0, 0)


def _adalora(trial: Trial, shape: Shape) -> Added:
    """P, Q and the singular values at the initial rank; PEFT keeps the rank of each matrix as one frozen number."""
    modules = _linear_modules(trial)
    method: Any = trial.method
    rank: int = method.start(trial.rank)
    if rank > shape.hidden_size:
        rule = f"must be <= {shape.hidden_size}, the hidden size of {trial.model.name}, got {rank}"
        raise InputError(Problem("method.initial_rank", rule))
    return Added(rank * (sum(_widths(modules)) + len(modules)), 0, len(modules))


def _vector_sizes(trial: Trial, shape: Shape) -> list[int]:
    """What is scaled at each site: the activation that enters the MLP's last layer, else a layer's output."""
    last = LAST_OF_MLP[shape.family]
    return [
        module.in_features if name_matches(module.name, last) else module.out_features
        for _, module in _inner_modules(trial)
    ]


def _ia3(trial: Trial, shape: Shape) -> Added:
    return Added(sum(_vector_sizes(trial, shape)), 0, 0)


def _mov(trial: Trial, shape: Shape) -> Added:
    """n vectors per site, and a router from what it looks at (hidden state, or what is scaled) to n experts."""
    experts, sizes = _setting(trial, "experts"), _vector_sizes(trial, shape)
    at_output = _setting(trial, "router_input") == "site_output"
    inputs = sizes if at_output else [_site_width(module, shape) for module in _modules(trial)]
    return Added(experts * sum(sizes), experts * sum(inputs), 0)


def _site_width(module: Module, shape: Shape) -> int:
    """The width of the state that enters a site's sub-layer: of the MLP the hidden size, not that of its last layer."""
    last = LAST_OF_MLP[shape.family]
    return shape.hidden_size if name_matches(module.name, last) else module.in_features


def _experts(trial: Trial, shape: Shape, counts: Sequence[int]) -> Added:
    """Per matrix and expert a LoRA pair, and a router from the matrix's input to its experts."""
    adapter = router = 0
    for layer, module in _inner_modules(trial):
        adapter += counts[layer] * trial.rank * (module.in_features + module.out_features)
        router += counts[layer] * module.in_features
    return Added(adapter, router, 0)


def _same_experts(trial: Trial, shape: Shape) -> Added:
    return _experts(trial, shape, [_setting(trial, "experts")] * shape.num_layers)


def _mola(trial: Trial, shape: Shape) -> Added:
    return _experts(trial, shape, per_layer(_setting(trial, "experts"), shape.num_layers, where="method.experts"))


def _prompt(trial: Trial, shape: Shape) -> Added:
    return Added(_room(trial, shape) * shape.hidden_size, 0, 0)


def _p_tuning(trial: Trial, shape: Shape) -> Added:
    """Embeddings of the virtual tokens and PEFT's encoder: an MLP of two hidden layers, or an LSTM and such an MLP."""
    tokens, hidden, width = _room(trial, shape), shape.hidden_size, _setting(trial, "encoder_hidden_size")
    size = tokens * hidden
    if _setting(trial, "encoder") == "mlp":
        return Added(size + _dense(hidden, width) + _dense(width, width) + _dense(width, hidden), 0, 0)
    layers = _setting(trial, "encoder_layers")
    for layer in range(layers):
        inputs = hidden if layer == 0 else 2 * width
        size += 2 * (4 * width * (inputs + width) + 8 * width)  # both directions, four gates, two biases
    return Added(size + _dense(2 * width, 2 * width) + _dense(2 * width, hidden), 0, 0)


def _prefix(trial: Trial, shape: Shape) -> Added:
    """A key and a value per layer and virtual token; with a projection these are made from embeddings by an MLP."""
    tokens, keys = _room(trial, shape), 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    if not _setting(trial, "projection"):
        return Added(tokens * keys, 0, 0)
    width, inputs = _setting(trial, "encoder_hidden_size"), shape.num_kv_heads * shape.head_dim
    return Added(tokens * inputs + _dense(inputs, width) + _dense(width, keys), 0, 0)


def _room(trial: Trial, shape: Shape) -> int:
    tokens: int = _setting(trial, "virtual_tokens")
    if tokens >= shape.max_positions:
        rule = f"must be < {shape.max_positions}, the positions of {trial.model.name}, got {tokens}"
        raise InputError(Problem("method.virtual_tokens", rule))
    return tokens


def _dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _bottleneck(trial: Trial, shape: Shape) -> Added:
    """Down and up projection with their biases: 2 d m + m + d, once or twice per layer, m = d / reduction_factor."""
    size = shape.hidden_size // _setting(trial, "reduction_factor")
    if size < 1:
        rule = f"must be <= {shape.hidden_size}, the hidden size of {trial.model.name}"
        raise InputError(Problem("method.reduction_factor", f"{rule}, got {_setting(trial, 'reduction_factor')}"))
    sites = 2 if _setting(trial, "style") == "houlsby" else 1
    return Added(shape.num_layers * sites * (_dense(shape.hidden_size, size) + _dense(size, shape.hidden_size)), 0, 0)


def _setting(trial: Trial, name: str) -> Any:
    return getattr(trial.method, name)


_ADDED: Mapping[str, Callable[[Trial, Shape], Added]] = MappingProxyType(
    {
        "lora": _lora,
        "rslora": _lora,
        "dora": _dora,
        "pissa": _decomposed,
        "olora": _decomposed,
        "lora_plus": _lora,
        "adalora": _adalora,
        "ia3": _ia3,
        "prompt_tuning": _prompt,
        "p_tuning": _p_tuning,
        "prefix_tuning": _prefix,
        "bottleneck": _bottleneck,
        "mov": _mov,
        "molora": _same_experts,
        "loramoe": _same_experts,
        "mola": _mola,
    }
)
