"""How many of a model's own weights a method trains, by arithmetic from the shape. One row per method in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.layer_groups import layer_of
from lora_lab.plan.shapes import Module, is_tied, modules_of
from lora_lab.plan.targets import name_matches, select_modules
from lora_lab.schema.model import Shape
from lora_lab.schema.trial import Trial


def trained_weights(trial: Trial, shape: Shape, base: int) -> int | None:
    """How many of the `base` weights are trained at a time; None where that number is drawn anew each period.

    Raises:
        InputError: layers or names that the shape does not have.
    """
    return _TRAINED[trial.method.kind](trial, shape, base)


def _all(trial: Trial, shape: Shape, base: int) -> int:
    return base


def _galore(trial: Trial, shape: Shape, base: int) -> int:
    """All of them; every projected matrix must be at least as wide as the rank."""
    problems = [
        Problem("rank", f"must be <= {width}, the smaller side of {module.name}, got {trial.rank}")
        for module in select_modules(shape, trial.target)
        if trial.rank > (width := min(module.in_features, module.out_features))
    ]
    if problems:
        raise InputError(problems[:1])
    return base


def _freeze(trial: Trial, shape: Shape, base: int) -> int:
    method: Any = trial.method
    last, names = method.last_layers, method.modules
    _check_layers("method.last_layers", last, shape, trial)
    modules = modules_of(shape)
    layers = {module.name: layer_of(module.name) for module in modules}
    chosen = {name for name, layer in layers.items() if layer is not None and layer >= shape.num_layers - last}
    problems = []
    for name in names:
        matched = [module.name for module in modules if _lies_in(module.name, name)]
        chosen.update(matched)
        if not matched:
            ends = list(dict.fromkeys(module.name.rpartition(".")[2] for module in modules))
            problems.append(Problem("method.modules", f'"{name}" matches no module' + nearest(name, ends)))
    if problems:
        raise InputError(problems)
    own = _own_modules(trial, shape)
    if len(own) < len(modules):  # tied: who names the head names the embedding
        chosen |= {one.name for one in own if one.parts == ("embedding",) and modules[-1].name in chosen}
    return sum(module.parameters for module in own if module.name in chosen)


def _lies_in(module_name: str, name: str) -> bool:
    """Whether the module, or one around it, is what `name` says (`mlp`, `model.layers.0`, `lm_head`)."""
    steps = module_name.split(".")
    return any(name_matches(".".join(steps[:end]), name) for end in range(1, len(steps) + 1))


def _lisa(trial: Trial, shape: Shape, base: int) -> int | None:
    method: Any = trial.method
    _check_layers("method.layers", method.layers, shape, trial)
    weights = method.weights
    if weights and len(weights) != shape.num_layers:
        rule = f"expected a probability for each of the {shape.num_layers} layers, got {len(weights)}"
        raise InputError(Problem("method.weights", rule))
    if method.probabilities != "uniform":
        return None
    modules = _own_modules(trial, shape)
    always = sum(module.parameters for module in modules if layer_of(module.name) is None)
    layer: int = sum(module.parameters for module in modules if layer_of(module.name) == 0)
    return always + int(method.layers) * layer


def _own_modules(trial: Trial, shape: Shape) -> list[Module]:
    """Every module once: a tied head is the embedding."""
    tied = is_tied(shape, tie_embeddings=trial.model.tie_embeddings)
    return [module for module in modules_of(shape) if not (tied and module.parts == ("head",))]


def _check_layers(where: str, layers: int, shape: Shape, trial: Trial) -> None:
    if layers > shape.num_layers:
        rule = f"must be <= {shape.num_layers}, the layers of {trial.model.name}, got {layers}"
        raise InputError(Problem(where, rule))


_TRAINED: Mapping[str, Callable[[Trial, Shape, int], int | None]] = MappingProxyType(
    {"full": _all, "freeze": _freeze, "lisa": _lisa, "galore": _galore}
)
