"""Adapters melted into the base, and several adapters combined into one."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_lab.adapters.combination import (
    EQUAL_RANK_KINDS,
    OTHER_NAMES,
    CombineKind,
    Factors,
    Pair,
    combine_factors,
    number_problems,
)
from lora_lab.adapters.dequantized import on_plain_base
from lora_lab.adapters.mergeable import type_problem
from lora_lab.errors import InputError, Problem, nearest


@dataclass(frozen=True, slots=True)
class Merged:
    """model: a plain transformers model. largest_logit_difference: of its logits to the adapter's, over the probe."""

    model: Any
    largest_logit_difference: float


def merge_into_base(model: PeftModel, probe_ids: Tensor) -> Merged:
    """A copy of the base with the active adapters melted into its weights; `model` itself is left as it was.

    LoRA adds s B A, of each active adapter; DoRA, AdaLoRA and IA3 as PEFT merges them. The result has the base's
    precision; sums are made in float32 at least and rounded once, where PEFT rounds each update before it is added.
    A quantized base is first turned back into plain weights, so nothing is quantized twice: for 4 bits these are the
    numbers the layers multiplied by, for int8 the inputs are no longer rounded either.
    probe_ids: token ids, shape (rows, tokens), on which the logits of `model`, on its own base, quantized or not, and
    of the result are compared; the difference holds all of these roundings.

    Raises:
        InputError: the method has no equal in weights, or the merged weights or logits are not finite.
    """
    before = _logits(model, probe_ids)
    merged = melt_into_base(copy.deepcopy(model))
    difference = float((_logits(merged, probe_ids) - before).abs().max())
    if not math.isfinite(difference):
        raise InputError(Problem("merge", "the logits of the adapter or of the merged model are not finite"))
    return Merged(merged, difference)


def melt_into_base(model: PeftModel) -> Any:
    """The base with the active adapters melted into its weights, as `merge_into_base` does it; takes `model` over."""
    _check_types(model)
    precision = model.get_base_model().get_input_embeddings().weight.dtype
    whole, dequantized = on_plain_base(model)
    targets = [module.get_base_layer() for module in whole.modules() if isinstance(module, BaseTunerLayer)]
    for layer in targets:
        layer.to(torch.promote_types(precision, torch.float32))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = whole.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(Problem("merge", str(error))) from error
    for layer in [*targets, *dequantized]:
        layer.to(precision)
    return merged


def _check_types(model: PeftModel) -> None:
    problems = [
        Problem("merge", problem)
        for name in model.active_adapters
        if (problem := type_problem(str(model.peft_config[name].peft_type.value)))
    ]
    if problems:
        raise InputError(problems)


def combine(
    model: PeftModel,
    names: Sequence[str],
    weights: Sequence[float],
    *,
    kind: CombineKind,
    density: float | None,
    result: str,
    seed: int | None = None,
) -> None:
    """Adds to `model` the LoRA adapter `result`, made of the LoRA adapters `names` with `weights`; not yet active.

    `adapters.combination` has the equation of each kind. A layer that only some of the adapters have is made of those.
    `density` goes with ties, dare_linear and dare_ties, `seed` with dare_*: the same seed gives the same result, and
    no global random state is drawn from. Ranks may differ for cat and svd, and from layer to layer for all.

    Raises:
        InputError: with every problem: unknown names, weights that do not fit, adapters that cannot be combined.
    """
    kind = OTHER_NAMES.get(kind, kind)  # type: ignore[assignment]  # a name of CombineKind, or refused below
    problems = [
        *_adapter_problems(model, names, kind=kind),
        *number_problems(len(names), weights, kind=kind, density=density, seed=seed),
        *_name_problems(model, result),
    ]
    if problems:
        raise InputError(problems)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        pairs = {
            layer_name: combine_factors(kind, _factors(layer, names, weights), density=density, generator=generator)
            for layer_name, layer in _layers(model, names)
        }
    _add(model, pairs, like=names[0], result=result)


def _add(model: PeftModel, pairs: dict[str, Pair], *, like: str, result: str) -> None:
    """The pairs as an adapter of scaling 1; settings that have no part in it are those of the adapter `like`."""
    ranks = {layer_name: a.shape[0] for layer_name, (a, _) in pairs.items()}
    rank = max(ranks.values())
    other = {layer_name: one for layer_name, one in ranks.items() if one != rank}
    config = replace(
        model.peft_config[like],
        r=rank,
        lora_alpha=rank,
        rank_pattern=other,
        alpha_pattern=dict(other),
        use_rslora=False,
        target_modules=list(pairs),
        init_lora_weights=True,
        inference_mode=True,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(result, config)
    for layer_name, (a, b) in pairs.items():
        target_a, target_b = _pair(model.get_base_model().get_submodule(layer_name), result)
        with torch.no_grad():
            target_a.copy_(a)
            target_b.copy_(b)


def _layers(model: PeftModel, names: Sequence[str]) -> list[tuple[str, Any]]:
    """Name, as the base has it, and module of each layer on which one of the adapters stands, in the model's order."""
    modules = model.get_base_model().named_modules()
    return [
        (layer_name, module)
        for layer_name, module in modules
        if isinstance(module, LoraLayer) and any(name in module.r for name in names)
    ]


def _pair(layer: Any, name: str) -> Pair:
    """A [rank, in] and B [out, rank]; for an embedding, in is the vocabulary and out the hidden size."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _factors(layer: Any, names: Sequence[str], weights: Sequence[float]) -> list[Factors]:
    return [
        Factors(*_pair(layer, name), c=weight * layer.scaling[name])
        for name, weight in zip(names, weights, strict=True)
        if name in layer.r
    ]


def _adapter_problems(model: PeftModel, names: Sequence[str], *, kind: str) -> list[Problem]:
    configs = model.peft_config
    problems = [
        Problem("adapters", f'no adapter "{name}"' + nearest(name, list(configs)))
        for name in names
        if name not in configs
    ]
    if not names or len(names) != len(set(names)):
        problems.append(Problem("adapters", f"expected different adapters, got {', '.join(names) or 'none'}"))
    known = [name for name in names if name in configs]
    barred = [f"{name} {reason}" for name in known if (reason := _not_plain_lora(configs[name]))]
    problems += [Problem("adapters", reason) for reason in barred]
    if not barred and kind in EQUAL_RANK_KINDS:
        problems += _rank_problems(model, known, kind=kind)
    return problems


def _not_plain_lora(config: Any) -> str | None:
    """Why an adapter is more than s B A on each of its layers, or None."""
    alone = "; merge it alone into the base"
    if config.peft_type.value != "LORA":
        return f"is of type {config.peft_type.value}, not LORA{alone}"
    if config.use_dora:
        return f"is a DoRA, whose magnitudes cannot be combined{alone}"
    beside = [key for key in ("lora_bias", "modules_to_save", "trainable_token_indices") if getattr(config, key, None)]
    if beside or config.bias != "none":
        return f"trains more than A and B ({', '.join(beside) or f'bias={config.bias}'}){alone}"
    return None


def _rank_problems(model: PeftModel, names: Sequence[str], *, kind: str) -> list[Problem]:
    """Of the first layer where ranks differ, not of all of them."""
    for layer_name, layer in _layers(model, names):
        ranks = {name: layer.r[name] for name in names if name in layer.r}
        if len(set(ranks.values())) > 1:
            listed = ", ".join(f"{name} has {rank}" for name, rank in ranks.items())
            rule = f"kind={kind} needs equal ranks ({listed}); kind=svd takes any, and so does kind=cat"
            return [Problem("adapters", f"{layer_name}: {rule}")]
    return []


def _name_problems(model: PeftModel, result: str) -> list[Problem]:
    problems = []
    if result in model.peft_config:
        problems.append(Problem("result", f'there is an adapter "{result}" already'))
    if "." in result or hasattr(nn.ModuleDict, result):  # PEFT makes the name an attribute of torch modules
        problems.append(Problem("result", f'"{result}" cannot be the name of an adapter; take another'))
    return problems


def _logits(model: Any, probe_ids: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=probe_ids.to(model.device)).logits.double()
    model.train(was_training)
    return logits
