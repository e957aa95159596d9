"""PEFT's tuner for mixtures of LoRA experts: what MoLoRA, LoRAMoE and MoLA have in common.

Every target matrix gets n LoRA pairs and a router of its own (`expert_layer` has the equation). The methods differ in
where that is done and how the router's weights are used:

- MoLoRA (Zadouri et al. 2023, arXiv 2309.05444): the same n everywhere, all experts weighted (top_k None).
- LoRAMoE (Dou et al. 2023, arXiv 2312.09979): linear layers of the MLP alone, top_k None, and a constraint on the
  routing of typed samples (`balance.localized_balancing_loss`).
- MoLA (Gao et al. 2024, arXiv 2402.08562): n by layer (`expert_pattern`), top_k 2, and a load-balancing loss.

Registered with PEFT as LORA_EXPERTS by `peft_types`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from torch import nn

from lora_lab.adapters.expert_layer import NO_MERGE, LoraExpertsLayer, matrix_size

RouterInit = Literal["normal", "kaiming"]


@dataclass(kw_only=True)
class LoraExpertsConfig(PeftConfig):  # type: ignore[misc]  # PEFT is untyped
    """Settings of one adapter; those without a default define the method and have none.

    r, lora_alpha: rank and alpha of every expert; the scaling is lora_alpha / r.
    num_experts, expert_pattern: experts of a target, and of those that have another number, by full module name.
    top_k: experts that a token keeps, its weights divided by their sum; None weights all of them by the softmax. With
        top_k 1 that weight is always 1, so only a balancing loss can train the router.
    router_init: "normal" (standard deviation 0.02, released code of MoV and MoLoRA) or "kaiming" (uniform, a=sqrt(5),
        released code of LoRAMoE and MoLA).
    target_modules: names of modules or their ends, as PEFT matches them; no regular expressions.
    bias: "none", "all" or "lora_experts_only": which biases of the base are trained with it.
    fan_in_fan_out: there for programs that set it for every adapter on GPT-2; the base weight is never touched, so
        nothing depends on it.

    Raises:
        ValueError: a value out of its range, named with its rule; more experts kept than a target has.
    """

    r: int
    lora_alpha: float
    num_experts: int
    top_k: int | None = None
    router_init: RouterInit
    target_modules: Any
    lora_dropout: float = 0.0
    expert_pattern: dict[str, int] = field(default_factory=dict)
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    bias: str = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LORA_EXPERTS"]
        if not isinstance(self.target_modules, (list, tuple, set)) or not self.target_modules:
            raise ValueError(f"target_modules: expected a list of module names, got {self.target_modules!r}")
        self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern: {self.layers_pattern!r} needs layers_to_transform")
        for key, value in (("r", self.r), ("num_experts", self.num_experts)):
            _check_count(key, value)
        for name, experts in self.expert_pattern.items():
            _check_count(f"expert_pattern[{name}]", experts)
        _check_choice("router_init", self.router_init, get_args(RouterInit))
        _check_choice("bias", self.bias, ("none", "all", "lora_experts_only"))
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha: expected a number > 0, got {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected 0 <= lora_dropout < 1, got {self.lora_dropout!r}")
        if self.top_k is not None:
            _check_count("top_k", self.top_k)
        # Which targets have num_experts shows on a model only; without a pattern it is all of them.
        for name in self.expert_pattern or ("every target",):
            self.experts_of(name)

    def experts_of(self, target: str) -> int:
        """Experts of the target of this full name; ValueError if top_k asks for more than it has."""
        experts = self.expert_pattern.get(target, self.num_experts)
        if self.top_k is not None and self.top_k > experts:
            raise ValueError(f"top_k: {self.top_k} is more than the {experts} experts of {target}")
        return experts


class LoraExpertsModel(BaseTuner):  # type: ignore[misc]  # PEFT is untyped
    """Puts the layers in; loading, saving, switching and deleting are PEFT's. It refuses to merge."""

    prefix = "lora_experts_"
    tuner_layer_cls = LoraExpertsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's attribute; targets are always given

    def _prepare_model(self, peft_config: LoraExpertsConfig, model: nn.Module) -> None:
        # Before the first layer is replaced, so that a refusal leaves the model as it was.
        targets = {name for name, module in self._targets(peft_config, model) if matrix_size(name, module)}
        for name in sorted(targets):
            peft_config.experts_of(name)
        unknown = sorted(set(peft_config.expert_pattern) - targets)
        if unknown and targets:  # without any target PEFT itself says so
            raise ValueError(f"expert_pattern: {', '.join(unknown[:3])} are not among the {len(targets)} targets")

    def _targets(self, peft_config: LoraExpertsConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, module in model.named_modules():
            if name and self._check_target_module_exists(peft_config, name):
                yield name, module

    def _create_and_replace(
        self,
        peft_config: LoraExpertsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        experts = peft_config.experts_of(current_key)
        if isinstance(target, LoraExpertsLayer):
            target.update_layer(adapter_name, experts, peft_config)
            return
        layer = LoraExpertsLayer(target, adapter_name, experts, peft_config, routing_name=current_key)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        # All of PEFT's ways to merge ask here first. The layers refuse too, but by then others may have been unpacked.
        raise ValueError(NO_MERGE)


class ExpertCounts(NamedTuple):
    """Elements of an adapter's expert pairs and, apart from them, of its routers."""

    experts: int
    routers: int


def count_experts(model: nn.Module, adapter_name: str) -> ExpertCounts:
    """Counts them in a model; a target of size in -> out has n*r*(in + out) and n*in.

    So on Llama-2-7B, r=8, all seven linear layers of 32 blocks, shapes with 20 experts in four groups (2-4-6-8,
    8-6-4-2, 8-2-2-8, 5-5-5-5) have 99,942,400 and 5,693,440, and 8-8-8-8 has 159,907,840 (as LoRA of rank 64) and
    9,109,504.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraExpertsLayer)]
    layers = [layer for layer in layers if adapter_name in layer.lora_experts_A]
    pairs = [(layer.lora_experts_A[adapter_name], layer.lora_experts_B[adapter_name]) for layer in layers]
    return ExpertCounts(
        experts=sum(a.numel() + b.numel() for a, b in pairs),
        routers=sum(layer.lora_experts_router[adapter_name].numel() for layer in layers),
    )


def _check_count(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: expected an integer >= 1, got {value!r}")


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")
