"""A causal LM's own weights by where they lie: in its decoder layers, or in none (embeddings, final norm, head)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.layer_groups import layer_of
from lora_lab.plan.targets import name_matches

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class PlacedWeights:
    """layers: parameters of each decoder layer, lowest first. outside: those in no layer; tied ones once, under the
    embedding's name."""

    layers: tuple[tuple[Named, ...], ...]
    outside: tuple[Named, ...]


def placed_weights(model: Any) -> PlacedWeights:
    """The parameters of a transformers causal LM by place.

    Raises:
        InputError: its layers are not where the lab looks for them (`layers.N` or `h.N`).
    """
    named: list[Named] = list(model.named_parameters())
    places = [layer_of(name) for name, _ in named]
    depth = int(model.config.num_hidden_layers)
    if {place for place in places if place is not None} != set(range(depth)):
        rule = f"the {depth} decoder layers of {model.config.model_type} were not found by name (layers.N or h.N)"
        raise InputError(Problem("model", rule))
    layers = tuple(
        tuple(one for one, place in zip(named, places, strict=True) if place == layer) for layer in range(depth)
    )
    return PlacedWeights(layers, tuple(one for one, place in zip(named, places, strict=True) if place is None))


def train_only(model: Any, last_layers: int, modules: Sequence[str]) -> None:
    """Leaves only the last decoder layers and the named modules (with all that is in them) trainable.

    modules: exact names, ends of them, or globs (`plan.targets.name_matches`). Of tied embeddings either name means the
    one weight.

    Raises:
        InputError: more layers than the model has, or names that match no module with parameters. The model is then
            left as it was.
    """
    placed = placed_weights(model)
    depth = len(placed.layers)
    if last_layers > depth:
        raise InputError(Problem("method.last_layers", f"must be <= {depth}, the model's layers, got {last_layers}"))
    owners = {name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    chosen: list[nn.Module] = []
    problems = []
    for name in modules:
        matched = [owner for owner in owners if name_matches(owner, name)]
        chosen += [owners[owner] for owner in matched]
        if not matched:
            ends = list(dict.fromkeys(owner.rpartition(".")[2] for owner in owners))
            problems.append(Problem("method.modules", f'"{name}" matches no module' + nearest(name, ends)))
    if problems:
        raise InputError(problems)
    model.requires_grad_(False)
    for layer in placed.layers[depth - last_layers :]:
        for _, parameter in layer:
            parameter.requires_grad_(True)
    for module in chosen:
        module.requires_grad_(True)
