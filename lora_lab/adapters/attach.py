"""Puts a trial's method on a base model: an adapter through PEFT, or all weights trainable, or none.

PEFT decides where an adapter's weights are computed and in which precision: float32 on a bf16 or 4-bit base, float64 on
a float64 base.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.dropout import DropoutClock, SeededDropout
from lora_lab.adapters.select import find_targets
from lora_lab.errors import InputError, Problem
from lora_lab.schema.model import HubModel
from lora_lab.schema.trial import Trial


@dataclass(frozen=True, slots=True)
class Attached:
    """model: a PeftModel, or the base itself for `full` and `base`. dropout_clock: None where there is no dropout."""

    model: Any
    dropout_clock: DropoutClock | None


class ParameterCounts(NamedTuple):
    """trainable: receives gradients; total: base and adapters, a shared tensor once."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts logical elements: a 4-bit weight counts as the matrix it stands for, not as its packed bytes."""
    parameters = list(model.parameters())
    return ParameterCounts(
        trainable=sum(_elements(parameter) for parameter in parameters if parameter.requires_grad),
        total=sum(_elements(parameter) for parameter in parameters),
    )


def _elements(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def attach(base_model: Any, trial: Trial, *, name: str = "default") -> Attached:
    """Makes `base_model` ready to train by `trial.method`.

    Initial weights follow from `trial.seeds.init` alone, global random state is left as it was. A model that carries
    adapters already (a PeftModel) gets one more under `name`, not yet active.
    `trial.dropout` acts on the inputs of linear layers; an adapter on an embedding has none, as in PEFT.

    Raises:
        InputError: the target does not fit the model, the base is quantized and the method is `full`, or DoRA meets an
            output whose weights are all zero (it divides by their norm).
    """
    kind = trial.method.kind
    if kind in ("base", "full"):
        if kind == "full" and getattr(base_model, "is_quantized", False):
            raise InputError(
                Problem("method", "full cannot train quantized weights; use an adapter such as method=lora")
            )
        base_model.requires_grad_(kind == "full")
        return Attached(base_model, None)
    inner = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    config = lora_config(inner, trial)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(trial.seeds.init)
        if isinstance(base_model, PeftModel):
            base_model.add_adapter(name, config)
            model = base_model
        else:
            model = get_peft_model(base_model, config, adapter_name=name)
    if kind == "dora":
        _check_magnitudes(model, name)
    clock = DropoutClock(seed=trial.seeds.dropout, step=0, micro_batch=0) if trial.dropout else None
    if clock is not None:
        _seed_dropouts(model, name=name, p=trial.dropout, clock=clock)
    return Attached(model, clock)


def lora_config(base_model: Any, trial: Trial) -> LoraConfig:
    """PEFT's configuration of the trial's adapter; raises InputError where the target does not fit the model.

    The scaling is alpha / rank, or alpha / sqrt(rank) for rslora. Targets are full module names, so that nothing
    matches by accident.
    """
    targets = find_targets(base_model, trial.target)
    kind = trial.method.kind
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=trial.rank,
        lora_alpha=trial.alpha,
        lora_dropout=trial.dropout,
        target_modules=targets,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        bias="none",
        fan_in_fan_out=_is_transposed(base_model.get_submodule(targets[0])),
        base_model_name_or_path=base_model.name_or_path or None,
        revision=trial.model.revision if isinstance(trial.model, HubModel) else None,
    )


def _is_transposed(layer: Any) -> bool:
    """GPT-2's Conv1D keeps inputs x outputs. PEFT corrects this for each layer that differs from the first."""
    return isinstance(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, Conv1D)


def _check_magnitudes(model: Any, name: str) -> None:
    problems = []
    for layer, module in model.named_modules():
        if not isinstance(module, LoraLayer) or name not in module.lora_magnitude_vector:
            continue
        zeros = int((module.lora_magnitude_vector[name].weight == 0).sum())
        if zeros:
            rule = f"{zeros} outputs have weights that are all zero, and DoRA divides by their norm; use method=lora"
            problems.append(Problem("method", f"{layer}: {rule}"))
    if problems:
        raise InputError(problems)


def _seed_dropouts(model: Any, *, name: str, p: float, clock: DropoutClock) -> None:
    entries = [m.lora_dropout for m in model.modules() if isinstance(m, LoraLayer) and name in m.lora_dropout]
    for index, entry in enumerate(entries):
        entry[name] = SeededDropout(p, clock=clock, index=index)
        entry[name].train(model.training)
