"""Which kinds of adapters are accepted from a folder, and which of their settings: one row per kind.

A setting that has no rule in its row must be off, that is empty or PEFT's default: what PEFT will do with it is not
known here. The lab sets the settings of `fixed` itself, whatever a folder says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from lora_lab.adapters.bottleneck import BottleneckConfig
from lora_lab.adapters.lora_experts import LoraExpertsConfig
from lora_lab.adapters.mov import MovConfig
from lora_lab.adapters.setting_rules import (
    Rule,
    anything,
    by_name,
    count,
    flag,
    mask,
    names,
    not_negative,
    one_of,
    optional_count,
    optional_names,
    optional_steps,
    plain_init,
    positive,
    share,
    text,
)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A kind of adapter. config: PEFT's configuration class. rules: setting -> its rule.

    fixed: setting -> value it gets when a folder is loaded: no initialisation runs, the weights come from the folder.
    rank: the setting that is the rank. of_model: settings that PEFT derives from the model; a folder may repeat them.
    """

    config: type[Any]
    rules: Mapping[str, Rule]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rank: str | None = None
    of_model: tuple[str, ...] = ()


def setting_problems(kind: Accepted, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, what is wrong with it) of an adapter_config.json; settings of every PEFT version that are off pass."""
    rules = {**_GENERAL, **kind.rules}
    off = _values_when_off(kind.config)
    problems = []
    for key in dict.fromkeys([*config, *rules]):
        value = config.get(key)
        if key in rules:
            message = rules[key](value)
        elif not value or key in _WRITTEN_BY_PEFT or (key in off and value == off[key]):
            message = None
        elif key in _IMPORTING:
            message = "it can make PEFT import code; refused"
        else:
            message = "not supported" if key in off else "unknown setting"
        if message:
            problems.append((key, message))
    return problems


def _values_when_off(config: type[Any]) -> dict[str, Any]:
    return {
        one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(config)
    }


# Not fields of the classes, but in every configuration that PEFT writes.
_WRITTEN_BY_PEFT = ("peft_version", "loaded_in_4bit", "loaded_in_8bit")
_IMPORTING = ("auto_mapping", "megatron_config", "megatron_core")
_GENERAL: Mapping[str, Rule] = MappingProxyType(
    {
        "peft_type": anything,  # by which the row was found
        "task_type": one_of("CAUSAL_LM", None),
        "base_model_name_or_path": text,
        "revision": text,
        "inference_mode": flag,
    }
)
_LORA: Mapping[str, Rule] = MappingProxyType(
    {
        "lora_alpha": positive,
        "lora_dropout": share,
        "target_modules": names,
        "modules_to_save": optional_names,
        "fan_in_fan_out": flag,
        "bias": one_of("none", None),  # others change the base's own biases
        "init_lora_weights": plain_init,
    }
)
# A prompt's weights say nothing of layers and heads, but both tell what it was trained on.
_OF_MODEL = ("token_dim", "num_layers", "num_attention_heads")
_PROMPT: Mapping[str, Rule] = MappingProxyType(
    {
        "num_virtual_tokens": count,
        "num_transformer_submodules": one_of(1, None),
        **dict.fromkeys(_OF_MODEL, optional_count),
    }
)

# The lab's own kinds at the end are registered with PEFT in `adapters.peft_types`.
ACCEPTED: Mapping[str, Accepted] = MappingProxyType(
    {
        "LORA": Accepted(
            LoraConfig,
            {
                **_LORA,
                "r": count,
                "rank_pattern": by_name(count),
                "alpha_pattern": by_name(positive),
                "use_rslora": flag,
                "use_dora": flag,
                "lora_bias": flag,
            },
            fixed={"init_lora_weights": True},
            rank="r",
        ),
        "ADALORA": Accepted(
            AdaLoraConfig,
            {
                **_LORA,
                "r": optional_count,  # means nothing to PEFT
                "init_r": count,
                "target_r": count,
                "rank_pattern": by_name(mask),
                "tinit": optional_steps,
                "tfinal": optional_steps,
                "deltaT": optional_count,
                "total_step": count,
                "beta1": share,
                "beta2": share,
                "orth_reg_weight": not_negative,
            },
            fixed={"init_lora_weights": True},
            rank="init_r",
        ),
        "IA3": Accepted(
            IA3Config,
            {
                "target_modules": names,
                "feedforward_modules": optional_names,
                "modules_to_save": optional_names,
                "fan_in_fan_out": flag,
                "init_ia3_weights": flag,
            },
            fixed={"init_ia3_weights": True},
        ),
        "PROMPT_TUNING": Accepted(
            PromptTuningConfig,
            {
                **_PROMPT,
                "prompt_tuning_init": one_of("TEXT", "SAMPLE_VOCAB", "RANDOM", None),
                "prompt_tuning_init_text": text,
                "tokenizer_name_or_path": text,  # never loaded: see `fixed`
            },
            fixed={"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None},
            of_model=_OF_MODEL,
        ),
        "P_TUNING": Accepted(
            PromptEncoderConfig,
            {
                **_PROMPT,
                "encoder_reparameterization_type": one_of("MLP", "LSTM", None),
                "encoder_hidden_size": optional_count,
                "encoder_num_layers": optional_count,
                "encoder_dropout": share,
            },
            of_model=_OF_MODEL,
        ),
        "PREFIX_TUNING": Accepted(
            PrefixTuningConfig,
            {
                **_PROMPT,
                "prefix_projection": flag,
                "encoder_hidden_size": optional_count,
                "init_weights": one_of("zero", None),
            },
            of_model=_OF_MODEL,
        ),
        "BOTTLENECK": Accepted(
            BottleneckConfig,
            {
                "target_modules": names,
                "modules_to_save": optional_names,
                "bias": one_of("none", None),
                "bottleneck_size": count,
                "bottleneck_dropout": share,
                "activation": one_of("relu", "gelu", "silu", "tanh"),
                "placement": one_of("output", "parallel"),
                "scaling": positive,
                "hidden_size": optional_count,
            },
        ),
        "MOV": Accepted(
            MovConfig,
            {
                "target_modules": names,
                "feedforward_modules": optional_names,
                "modules_to_save": optional_names,
                "fan_in_fan_out": flag,
                "num_experts": count,
                "router_input": one_of("site_input", "site_output"),
            },
        ),
        "LORA_EXPERTS": Accepted(
            LoraExpertsConfig,
            {
                "r": count,
                "lora_alpha": positive,
                "lora_dropout": share,
                "target_modules": names,
                "modules_to_save": optional_names,
                "fan_in_fan_out": flag,
                "bias": one_of("none", None),
                "num_experts": count,
                "expert_pattern": by_name(count),
                "top_k": optional_count,
                "router_init": one_of("normal", "kaiming"),
            },
        ),
    }
)
