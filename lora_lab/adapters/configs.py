"""From a trial to PEFT's configuration of its adapter: one row per method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from peft import PeftConfig

from lora_lab.adapters.adalora import adalora_config
from lora_lab.adapters.bottleneck import BottleneckConfig, bottleneck_targets
from lora_lab.adapters.ia3 import ia3_config, ia3_sites
from lora_lab.adapters.lora import is_transposed, lora_config, named_base
from lora_lab.adapters.lora_experts import LoraExpertsConfig
from lora_lab.adapters.mov import MovConfig
from lora_lab.adapters.prompts import p_tuning_config, prefix_tuning_config, prompt_tuning_config
from lora_lab.adapters.select import find_targets
from lora_lab.plan.layer_groups import layer_of, per_layer
from lora_lab.schema.adapter_methods import Bottleneck, PrefixTuning, PromptTuning, PTuning
from lora_lab.schema.expert_methods import Loramoe, Mola, Molora, Mov
from lora_lab.schema.trial import Trial


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What some methods need to know beside base and trial. tokenizer: for prompts that start from a text; steps: of
    the training, for schedules of a method's own. None where the caller has none."""

    tokenizer: Any | None
    steps: int | None


def adapter_config(base_model: Any, trial: Trial, surroundings: Surroundings) -> PeftConfig:
    """PEFT's configuration of the trial's adapter on `base_model` (plain, or with adapters already).

    Raises:
        InputError: target, ranks or sizes do not fit the model.
        ValueError: the method needs a tokenizer or the number of steps, and there is none.
    """
    return _CONFIGS[trial.method.kind](base_model, trial, surroundings)


def _lora(base_model: Any, trial: Trial, _: Surroundings) -> PeftConfig:
    return lora_config(base_model, trial)


def _adalora(base_model: Any, trial: Trial, surroundings: Surroundings) -> PeftConfig:
    if surroundings.steps is None:
        raise ValueError("adalora prunes along a schedule: the number of steps is needed")
    return adalora_config(base_model, trial, steps=surroundings.steps)


def _ia3(base_model: Any, trial: Trial, _: Surroundings) -> PeftConfig:
    targets = find_targets(base_model, trial.target, kind="ia3")
    named = named_base(base_model, trial)
    return ia3_config(
        targets,
        feedforward=ia3_sites(base_model, targets),
        fan_in_fan_out=is_transposed(base_model, targets[0]),
        base_model_name_or_path=named["base_model_name_or_path"],
        revision=named["revision"],
    )


def _mov(base_model: Any, trial: Trial, _: Surroundings) -> PeftConfig:
    method = trial.method
    assert isinstance(method, Mov)
    targets = find_targets(base_model, trial.target, kind="mov")
    return MovConfig(
        **named_base(base_model, trial),
        target_modules=targets,
        feedforward_modules=ia3_sites(base_model, targets),
        num_experts=method.experts,
        router_input=method.router_input,
        fan_in_fan_out=is_transposed(base_model, targets[0]),
    )


def _bottleneck(base_model: Any, trial: Trial, _: Surroundings) -> PeftConfig:
    method = trial.method
    assert isinstance(method, Bottleneck)
    return BottleneckConfig(
        **named_base(base_model, trial),
        target_modules=bottleneck_targets(base_model, method.style),
        bottleneck_size=base_model.config.hidden_size // method.reduction_factor,
        activation=method.activation,
        placement="parallel" if method.style == "parallel" else "output",
        scaling=method.scaling,
        bottleneck_dropout=trial.dropout,
        hidden_size=base_model.config.hidden_size,
    )


def _experts(base_model: Any, trial: Trial, _: Surroundings) -> PeftConfig:
    """molora and loramoe mix all experts, mola the best `top_k`; routers start as in each one's released code."""
    method = trial.method
    assert isinstance(method, (Molora, Loramoe, Mola))
    layers = base_model.config.num_hidden_layers
    counts = (
        per_layer(method.experts, layers, where="method.experts")
        if isinstance(method, Mola)
        else (method.experts,) * layers
    )
    targets = find_targets(base_model, trial.target, kind=method.kind)
    of_target = {name: counts[layer] for name in targets if (layer := layer_of(name)) is not None}
    return LoraExpertsConfig(
        **named_base(base_model, trial),
        r=trial.rank,
        lora_alpha=trial.alpha,
        lora_dropout=trial.dropout,
        target_modules=targets,
        num_experts=max(counts),
        expert_pattern={name: count for name, count in of_target.items() if count != max(counts)},
        top_k=method.top_k if isinstance(method, Mola) else None,
        router_init="normal" if isinstance(method, Molora) else "kaiming",
        fan_in_fan_out=is_transposed(base_model, targets[0]),
    )


def _prompt_tuning(base_model: Any, trial: Trial, surroundings: Surroundings) -> PeftConfig:
    method = trial.method
    assert isinstance(method, PromptTuning)
    if method.init == "text" and surroundings.tokenizer is None:
        raise ValueError("a prompt that starts from a text needs the tokenizer")
    return prompt_tuning_config(
        base_model,
        virtual_tokens=method.virtual_tokens,
        init=method.init,
        init_text=method.init_text,
        tokenizer=surroundings.tokenizer,
        **named_base(base_model, trial),
    )


def _p_tuning(base_model: Any, trial: Trial, _: Surroundings) -> PeftConfig:
    method = trial.method
    assert isinstance(method, PTuning)
    return p_tuning_config(
        base_model,
        virtual_tokens=method.virtual_tokens,
        encoder=method.encoder,
        encoder_hidden_size=method.encoder_hidden_size,
        encoder_layers=method.encoder_layers,
        **named_base(base_model, trial),
    )


def _prefix_tuning(base_model: Any, trial: Trial, _: Surroundings) -> PeftConfig:
    method = trial.method
    assert isinstance(method, PrefixTuning)
    return prefix_tuning_config(
        base_model,
        virtual_tokens=method.virtual_tokens,
        projection=method.projection,
        encoder_hidden_size=method.encoder_hidden_size,
        **named_base(base_model, trial),
    )


_CONFIGS: Mapping[str, Callable[[Any, Trial, Surroundings], PeftConfig]] = MappingProxyType(
    {
        "lora": _lora,
        "rslora": _lora,
        "dora": _lora,
        "pissa": _lora,
        "olora": _lora,
        "lora_plus": _lora,
        "adalora": _adalora,
        "ia3": _ia3,
        "prompt_tuning": _prompt_tuning,
        "p_tuning": _p_tuning,
        "prefix_tuning": _prefix_tuning,
        "bottleneck": _bottleneck,
        "mov": _mov,
        "molora": _experts,
        "loramoe": _experts,
        "mola": _experts,
    }
)
