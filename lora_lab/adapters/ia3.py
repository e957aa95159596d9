"""IA3: which layers are scaled at their input, PEFT's configuration of it, and its layers on a quantized base.

IA3 (Liu et al. 2022, arXiv 2205.05638, section 3.3) learns three vectors per block, all ones at the start:
softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V) and (l_ff * act(W_1 x)) W_2. PEFT puts l_k and l_v on the outputs of the key
and value layers and l_ff on the input of the MLP's last layer, so L (d_k + d_v + d_ff) parameters. Where query, key and
value are one fused layer (GPT-2's c_attn), PEFT scales all of it, queries too: L (3 d + d_ff).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import IA3Config
from peft.tuners.ia3 import IA3Model
from torch import nn

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.targets import LAST_OF_MLP


def ia3_sites(model: Any, names: Sequence[str]) -> list[str]:
    """Those of `names` (full names of targeted layers of the causal LM `model`) that are scaled at their input.

    The others are scaled at their output. In order of `names`; empty where no MLP's last layer is among them.

    Raises:
        InputError: it is not known what the family of `model` calls that layer.
    """
    family = model.config.model_type
    if family not in LAST_OF_MLP:
        rule = f'the last layer of the MLP is not known for the family "{family}"'
        raise InputError(Problem("model", rule + nearest(family, list(LAST_OF_MLP))))
    return [name for name in names if f".{name}".endswith(f".{LAST_OF_MLP[family]}")]


def ia3_config(
    targets: Sequence[str],
    *,
    feedforward: Sequence[str],
    fan_in_fan_out: bool,
    base_model_name_or_path: str | None,
    revision: str | None,
) -> IA3Config:
    """PEFT's configuration of IA3 on the layers `targets`, those of `feedforward` (from `ia3_sites`) at their input.

    fan_in_fan_out: the layers are GPT-2's Conv1D, which keep inputs x outputs.

    Raises:
        ValueError: a feedforward layer is not among the targets.
    """
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=list(targets),
        feedforward_modules=list(feedforward),
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
    )


class DtypeKeepingIA3Model(IA3Model):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's IA3, whose layers on a quantized base give back the precision they were given.

    As of PEFT 0.21 those layers return float32 whatever comes in, so that on a bfloat16 model attention meets queries
    in one precision and keys in another, and fails. Nothing else differs; `peft_types` has PEFT take this class.
    """

    @staticmethod
    def _create_new_module(ia3_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        module: nn.Module = IA3Model._create_new_module(ia3_config, adapter_name, target, **kwargs)
        if type(module).__module__ == "peft.tuners.ia3.bnb":
            module.register_forward_hook(_in_dtype_of_input)
        return module


def _in_dtype_of_input(_layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(args[0].dtype)
