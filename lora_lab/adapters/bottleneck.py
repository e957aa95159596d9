"""Bottleneck adapters as a PEFT tuner: Houlsby's, Pfeiffer's and the parallel one.

An adapter is a small MLP with biases, d -> m -> d: change(u) = scaling * (up(act(down(dropout(u))))). It has
2 d m + m + d parameters. With h the output of the layer or module it sits on and x its input:

    output     h + change(h)    on the layer that ends a sub-layer, before the block's residual addition
    parallel   h + change(x)    around a whole MLP

Styles and their sources, all for d = the model's hidden size:

    houlsby    output, two per block, after attention and after the MLP (Houlsby et al. 2019, arXiv 1902.00751)
    pfeiffer   output, one per block, after the MLP (Pfeiffer et al. 2020, arXiv 2005.00247)
    parallel   parallel, one per block, on the MLP (He et al. 2021, arXiv 2110.04366; scaled by 4, or 2 on GLUE)

How we differ. Houlsby's and Pfeiffer's models are BERTs, whose layer norm follows each residual addition: Houlsby's
adapter sits, as here, between a sub-layer's last dropout and that addition, and the layer norms are trained too.
Pfeiffer's reads LayerNorm(h + residual), is added to h, and the same norm comes once more after it. The models here
normalise before a sub-layer, so there is no such norm: both styles read the sub-layer's output alone, and no norm is
trained or added. (The `adapters` package has Pfeiffer's read h + residual on such models, without a norm.)
Initialisation is He et al.'s for all three: down Kaiming-uniform (a = sqrt 5, so within 1 / sqrt d), up and biases
zero, so that an adapter starts with no effect at all; Houlsby's starts near none, with both matrices from a normal of
1e-3, cut at two deviations. Dropout is on the adapter's input, as in LoRA; He et al. have it after the activation.
gelu is the exact one; Houlsby's code has the tanh approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_lab.errors import InputError, Problem, nearest

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh}
)
PLACEMENTS = ("output", "parallel")
_LLAMA_STYLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"houlsby": ("self_attn.o_proj", "mlp.down_proj"), "pfeiffer": ("mlp.down_proj",), "parallel": ("mlp",)}
)
_GPT2_STYLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"houlsby": ("attn.c_proj", "mlp.c_proj"), "pfeiffer": ("mlp.c_proj",), "parallel": ("mlp",)}
)
# family -> style -> the ends of the dotted names of the modules that carry an adapter, per block
_STYLES = MappingProxyType(
    {"llama": _LLAMA_STYLES, "mistral": _LLAMA_STYLES, "qwen2": _LLAMA_STYLES, "gpt2": _GPT2_STYLES}
)
STYLES = tuple(_LLAMA_STYLES)
_NOT_MERGEABLE = "a bottleneck adapter is not linear, so it cannot be merged into the weights; keep it as an adapter"


def bottleneck_targets(model: Any, style: str) -> list[str]:
    """Full names, in the model's order, of the modules of the causal LM `model` that carry the adapters of `style`.

    Placement is "parallel" for the style of that name, "output" for the others.

    Raises:
        InputError: no such style, or a family whose module names are not known.
    """
    family = model.config.model_type
    problems = []
    if style not in STYLES:
        problems.append(Problem("method.style", f'no such style "{style}"' + nearest(style, STYLES)))
    if family not in _STYLES:
        rule = f'where bottleneck adapters go is not known for the family "{family}"'
        problems.append(Problem("model", rule + nearest(family, list(_STYLES))))
    if problems:
        raise InputError(problems)
    ends = tuple(f".{suffix}" for suffix in _STYLES[family][style])
    return [name for name, _ in model.named_modules() if f".{name}".endswith(ends)]


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's configuration of bottleneck adapters.

    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias: as in PEFT's LoraConfig
    (bias: "none", "all" or "bottleneck_only", of the base).
    bottleneck_size: m, at least 1; for a reduction factor f it is hidden_size // f.
    placement: "output" or "parallel". scaling: finite factor of the change. bottleneck_dropout: 0 <= p < 1.
    hidden_size: d for placement "parallel"; None takes the model's own. A layer with placement "output" knows its d.

    Raises:
        ValueError: a value outside these.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    bottleneck_size: int = 0
    activation: str = "relu"
    placement: str = "output"
    scaling: float = 1.0
    bottleneck_dropout: float = 0.0
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        """Checks the values and makes sets of lists of names, as PEFT does."""
        super().__post_init__()
        self.peft_type = PeftType["BOTTLENECK"]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if not isinstance(self.bottleneck_size, int) or self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size: expected an integer >= 1, got {self.bottleneck_size}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f'activation: no such "{self.activation}"' + nearest(self.activation, list(ACTIVATIONS)))
        if self.placement not in PLACEMENTS:
            raise ValueError(f'placement: no such "{self.placement}"' + nearest(self.placement, PLACEMENTS))
        if self.bias not in ("none", "all", "bottleneck_only"):
            raise ValueError(f'bias: expected "none", "all" or "bottleneck_only", got "{self.bias}"')
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling: expected a finite number, got {self.scaling}")
        if not 0 <= self.bottleneck_dropout < 1:
            raise ValueError(f"bottleneck_dropout: expected 0 <= p < 1, got {self.bottleneck_dropout}")


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT is untyped
    """A layer or an MLP with bottleneck adapters; those that are active each see the same input, their changes add up.

    lora_dropout: adapter name -> dropout of the adapter's input, under the name that PEFT's LoRA layers have for it.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("lora_dropout", "bottleneck_activation", "bottleneck_scaling")
    # PEFT's, which is untyped:
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, *, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.placement = config.placement
        self.width = width
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.bottleneck_activation: dict[str, str] = {}
        self.bottleneck_scaling: dict[str, float] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds an adapter with new weights."""
        p = config.bottleneck_dropout
        self.bottleneck_down[adapter_name] = nn.Linear(self.width, config.bottleneck_size)
        self.bottleneck_up[adapter_name] = nn.Linear(config.bottleneck_size, self.width)
        self.lora_dropout[adapter_name] = nn.Dropout(p) if p else nn.Identity()
        self.bottleneck_activation[adapter_name] = config.activation
        self.bottleneck_scaling[adapter_name] = config.scaling
        self.reset_bottleneck_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_bottleneck_parameters(self, adapter_name: str) -> None:
        """down Kaiming-uniform from torch's global generator; up and both biases zero."""
        down: Any = self.bottleneck_down[adapter_name]
        up: Any = self.bottleneck_up[adapter_name]
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` (..., d_in) of the base layer; (..., d) in the precision of the base's output."""
        h: Tensor = self.base_layer(x, *args, **kwargs)
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.bottleneck_up]
        u = x if self.placement == "parallel" else h
        result = h
        for name in names:
            result = result + self._change(name, u)
        return result.to(h.dtype)

    def _change(self, name: str, u: Tensor) -> Tensor:
        down: Any = self.bottleneck_down[name]
        u = self.lora_dropout[name](u.to(down.weight.dtype))
        change: Tensor = self.bottleneck_up[name](ACTIVATIONS[self.bottleneck_activation[name]](down(u)))
        return change * self.bottleneck_scaling[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always a ValueError."""
        raise ValueError(_NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        """A whole MLP has no weight of its own: its first layer speaks for it."""
        plain = next((part for part in base_layer.modules() if _is_linear(part)), base_layer)
        return super()._get_base_layer_device_and_dtype(plain)


class BottleneckModel(BaseTuner):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's model of bottleneck adapters. All adapters of one model have the same placement."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: Mapping[str, list[str]] = MappingProxyType({})

    def _check_new_adapter_config(self, config: BottleneckConfig) -> None:
        """Adapters on an MLP and on layers inside it would hide each other from PEFT."""
        super()._check_new_adapter_config(config)
        placements = {other.placement for other in self.peft_config.values()}
        if len(placements) > 1:
            raise ValueError("placement: adapters of one model must all have the same, got output and parallel")

    def _check_merge_allowed(self) -> None:
        raise ValueError(_NOT_MERGEABLE)

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        width = self._width(peft_config, target, current_key)
        layer = BottleneckLayer(target, adapter_name, peft_config, width=width)
        if adapter_name not in self.active_adapters:  # a further adapter is not trained until it is chosen
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, BottleneckLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading; PEFT would hand over the weight, which a whole MLP does not have
            setattr(parent, child_name, new_module)

    def _width(self, config: BottleneckConfig, target: Any, name: str) -> int:
        if config.placement == "output":
            if not _is_linear(target):
                raise ValueError(f'{name}: placement "output" needs a linear layer, got {type(target).__name__}')
            return int(target.nf if isinstance(target, Conv1D) else target.out_features)
        if _is_linear(target):
            raise ValueError(f'{name}: placement "parallel" needs a whole MLP, got {type(target).__name__}')
        width = config.hidden_size or getattr(getattr(self.model, "config", None), "hidden_size", None)
        if width is None:
            raise ValueError(f'{name}: placement "parallel" needs hidden_size, which this model does not say')
        return int(width)


def _is_linear(module: object) -> bool:
    """bitsandbytes' 4-bit and 8-bit layers are kinds of nn.Linear."""
    return isinstance(module, (nn.Linear, Conv1D))
