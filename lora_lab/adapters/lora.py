"""PEFT's configuration of the LoRA family: lora, rslora, dora, lora_plus, and the frame of pissa and olora.

y = W x + s B A x with A [r, in], B [out, r]; s = alpha / r, for rslora alpha / sqrt(r). LoRA+ is this adapter with
another learning rate for B (`optim.groups`). With `rank_factors` a layer's rank and alpha are both multiplied by its
factor, so that s is the same everywhere (for rslora it then grows with the root of the factor, as its definition says).
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.select import find_targets
from lora_lab.errors import InputError, Problem
from lora_lab.plan.layer_groups import layer_of
from lora_lab.plan.method_counts import rank_of_layers
from lora_lab.schema.model import HubModel
from lora_lab.schema.trial import Trial


def lora_config(base_model: Any, trial: Trial) -> LoraConfig:
    """PEFT's configuration of the trial's adapter; raises InputError where the target does not fit the model.

    Targets are full module names, so that nothing matches by accident.
    """
    targets = find_targets(base_model, trial.target, kind=trial.method.kind)
    ranks = {
        name: rank
        for name, rank in ranks_of(trial, targets, num_layers=base_model.config.num_hidden_layers).items()
        if rank != trial.rank
    }
    return LoraConfig(
        **named_base(base_model, trial),
        r=trial.rank,
        lora_alpha=trial.alpha,
        lora_dropout=trial.dropout,
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern={name: trial.alpha * rank / trial.rank for name, rank in ranks.items()},
        use_rslora=trial.method.kind == "rslora",
        use_dora=trial.method.kind == "dora",
        bias="none",
        fan_in_fan_out=is_transposed(base_model, targets[0]),
    )


def ranks_of(trial: Trial, targets: list[str], *, num_layers: int) -> dict[str, int]:
    """Full module name -> rank; raises InputError where `rank_factors` does not fit."""
    by_layer = rank_of_layers(trial, num_layers=num_layers)
    layers = {name: layer_of(name) for name in targets}
    return {name: trial.rank if layer is None else by_layer.get(layer, trial.rank) for name, layer in layers.items()}


def named_base(base_model: Any, trial: Trial) -> dict[str, Any]:
    """What every PEFT configuration says of its base."""
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model.name_or_path or None,
        "revision": trial.model.revision if isinstance(trial.model, HubModel) else None,
    }


def is_transposed(base_model: Any, target: str) -> bool:
    """GPT-2's Conv1D keeps inputs x outputs. PEFT corrects this for each layer that differs from the first."""
    layer: Any = base_model.get_submodule(target)
    return isinstance(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, Conv1D)


def check_magnitudes(model: Any, name: str) -> None:
    """Raises InputError where DoRA would divide by zero: an output whose weights are all zero."""
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
