"""Adapters melted into the base, and several adapters combined into one."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab.errors import InputError, Problem, nearest

CombineKind = Literal["linear", "svd", "ties"]
COMBINE_KINDS = ("linear", "svd", "ties")


@dataclass(frozen=True, slots=True)
class Merged:
    """model: a plain transformers model. largest_logit_difference: of its logits to the adapter's, over the probe."""

    model: Any
    largest_logit_difference: float


def merge_into_base(model: PeftModel, probe_ids: torch.Tensor) -> Merged:
    """A copy of the base with the active adapter added to its weights; `model` itself is left as it was.

    A 4-bit base is first turned back into plain weights of its compute precision, so nothing is quantized twice.
    probe_ids: token ids, shape (rows, tokens), on which the logits of `model` and of the result are compared.

    Raises:
        InputError: the merged weights or logits are not finite.
    """
    before = _logits(model, probe_ids)
    whole = _on_plain_base(copy.deepcopy(model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = whole.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(Problem("merge", str(error))) from error
    difference = float((_logits(merged, probe_ids) - before).abs().max())
    if not math.isfinite(difference):
        raise InputError(Problem("merge", "the logits of the adapter or of the merged model are not finite"))
    return Merged(merged, difference)


def combine(
    model: PeftModel,
    names: Sequence[str],
    weights: Sequence[float],
    *,
    kind: CombineKind,
    density: float | None,
    result: str,
) -> None:
    """Adds to `model` the adapter `result`, made of the adapters `names` with `weights` (PEFT's add_weighted_adapter).

    linear: A and B are each a weighted sum with factors sqrt(|weight x scaling|), the sign on A; products of different
    adapters are in it, so it is not the sum of the updates. svd: the sum of the updates, cut to the largest rank among
    them. ties: like linear, keeping the `density` largest entries and the majority's sign (Yadav et al. 2023,
    arXiv 2306.01708).

    Raises:
        InputError: with every problem: unknown names, weights that do not fit, adapters that cannot be combined.
    """
    problems = _combine_problems(model, names, weights, kind=kind, density=density, result=result)
    if problems:
        raise InputError(problems)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(
            list(names), list(weights), result, combination_type=kind, density=density, svd_full_matrices=False
        )
    # The scalings are in the weights now. PEFT sets alpha = rank, which for rslora would still multiply by sqrt(rank).
    model.peft_config[result].use_rslora = False
    for module in model.modules():
        if isinstance(module, LoraLayer) and result in module.scaling:
            module.scaling[result] = 1.0
            module.use_rslora[result] = False


def _combine_problems(
    model: PeftModel, names: Sequence[str], weights: Sequence[float], *, kind: str, density: float | None, result: str
) -> list[Problem]:
    configs = model.peft_config
    problems = [
        Problem("adapters", f'no adapter "{name}"' + nearest(name, list(configs)))
        for name in names
        if name not in configs
    ]
    if kind not in COMBINE_KINDS:
        problems.append(Problem("kind", f'no such kind "{kind}"' + nearest(kind, COMBINE_KINDS)))
    if not names or len(names) != len(set(names)):
        problems.append(Problem("adapters", f"expected different adapters, got {', '.join(names) or 'none'}"))
    if len(names) != len(weights):
        problems.append(Problem("weights", f"expected one per adapter ({len(names)}), got {len(weights)}"))
    problems += [Problem("weights", f"must be finite, got {weight}") for weight in weights if not math.isfinite(weight)]
    if (kind == "ties") != (density is not None) or (density is not None and not 0 < density <= 1):
        problems.append(
            Problem("density", f"goes with kind=ties, 0 < density <= 1; got kind={kind}, density={density}")
        )
    if result in configs:
        problems.append(Problem("result", f'there is an adapter "{result}" already'))
    if "." in result or hasattr(nn.ModuleDict, result):  # PEFT makes the name an attribute of torch modules
        problems.append(Problem("result", f'"{result}" cannot be the name of an adapter; take another'))
    known = {name: configs[name] for name in names if name in configs}
    problems += [
        Problem("adapters", f"{name} is a DoRA, whose magnitudes cannot be combined; merge it into the base instead")
        for name, config in known.items()
        if config.use_dora
    ]
    ranks = {name: config.r for name, config in known.items()}
    if kind in ("linear", "ties") and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name} has {rank}" for name, rank in ranks.items())
        problems.append(Problem("adapters", f"kind={kind} needs equal ranks ({listed}); kind=svd takes any"))
    return problems


def _on_plain_base(model: PeftModel) -> PeftModel:
    """The same adapter on the same base without 4-bit layers. Takes `model` over."""
    if not any(_is_four_bit(module) for module in model.modules()):
        return model
    name = model.active_adapter
    config = model.peft_config[name]
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    base = model.unload()
    _dequantize(base)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = get_peft_model(base, config, adapter_name=name)
    set_peft_model_state_dict(plain, weights, adapter_name=name)
    return plain


def _dequantize(base: Any) -> None:
    packed = [(name, layer) for name, layer in base.named_modules() if _is_four_bit(layer)]
    for name, layer in packed:
        base.set_submodule(name, _plain_layer(layer))
    base.hf_quantizer = None
    base.is_quantized = base.is_loaded_in_4bit = False
    for owner, key in ((base, "quantization_method"), (base.config, "quantization_config")):
        if hasattr(owner, key):
            delattr(owner, key)


def _plain_layer(layer: Any) -> nn.Module:
    import bitsandbytes  # there, since the layer is its own

    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(
        layer.compute_dtype
    )
    if issubclass(layer.source_cls, Conv1D):  # GPT-2 keeps its matrices transposed
        plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    return plain


def _logits(model: Any, probe_ids: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=probe_ids.to(model.device)).logits.double()
    model.train(was_training)
    return logits


def _is_four_bit(layer: Any) -> bool:
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def melt_into_base(m): ...
