"""A linear layer with a mixture of LoRA experts beside it, computed for all experts and tokens at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from lora_lab.adapters.lora_experts import LoraExpertsConfig
    from lora_lab.adapters.routing import RoutingLog

NO_MERGE = "a mixture of LoRA experts cannot be merged: its update of a weight is another one for every token"
_ROUTER_DEVIATION = 0.02


class LoraExpertsLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT is untyped
    """y = W x + (alpha / r) * sum_i s_i(x) B_i A_i dropout(x), with s = softmax(W_r x) over n experts.

    x [..., in] and y [..., out]. Per adapter: A [n, r, in] (each A_i as PEFT's LoRA: Kaiming uniform, a=sqrt(5)),
    B [n, out, r] (zero, so that the layer starts as its base) and the router W_r [n, in]: n*r*(in + out) + n*in
    parameters. With top_k the k largest of s are kept and divided by their sum, the others are exactly 0 (MoLA, Gao et
    al. 2024, arXiv 2402.08562). The router sees x without dropout and works in float32, under autocast too, or in
    float64 on a float64 base.

    All experts are computed for all tokens: one product gives n*r numbers per token, s scales them, one product goes
    back. Nothing waits for the device to say who chose whom, an expert without a token needs no case of its own, and
    its gradient is zero rather than missing.

    Differences: the released code of MoLoRA draws A from a normal distribution (0.02); those of LoRAMoE and MoLA loop
    over experts and draw another dropout mask for each, here all experts of a token see the same one.

    The base layer (nn.Linear, transformers' Conv1D, bitsandbytes' 4-bit and 8-bit layers) is only ever called. On a
    bf16 base the adapter is in float32, as PEFT does it, and the sum is rounded to the base's output dtype once.

    routing_log, routing_name: see `routing`; routing_adapter: the adapter whose routing is noted.
    """

    adapter_layer_names = ("lora_experts_A", "lora_experts_B", "lora_experts_router")
    other_param_names = ("r", "lora_alpha", "scaling", "num_experts", "top_k", "lora_dropout")

    routing_log: RoutingLog | None = None
    routing_adapter: str | None = None

    # What is used of PEFT's untyped half.
    active_adapters: list[str]
    disable_adapters: bool
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        num_experts: int,
        config: LoraExpertsConfig,
        *,
        routing_name: str,
    ) -> None:
        """`base_layer` with a first adapter; raises ValueError if it is no linear layer."""
        super().__init__()
        self.base_layer = base_layer
        self.routing_name = routing_name
        self.in_features, self.out_features = matrix_size(routing_name, self)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}
        self.top_k: dict[str, int | None] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_experts_A = nn.ParameterDict()
        self.lora_experts_B = nn.ParameterDict()
        self.lora_experts_router = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, num_experts, config)

    def update_layer(self, adapter_name: str, num_experts: int, config: LoraExpertsConfig) -> None:
        """Adds an adapter, its weights drawn from torch's global generator."""
        self.r[adapter_name] = config.r
        self.lora_alpha[adapter_name] = config.lora_alpha
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.num_experts[adapter_name] = num_experts
        self.top_k[adapter_name] = config.top_k
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        down = torch.empty(num_experts, config.r, self.in_features)
        nn.init.kaiming_uniform_(down.flatten(0, 1), a=math.sqrt(5))
        router = torch.empty(num_experts, self.in_features)
        if config.router_init == "normal":
            nn.init.normal_(router, std=_ROUTER_DEVIATION)
        else:
            nn.init.kaiming_uniform_(router, a=math.sqrt(5))
        self.lora_experts_A[adapter_name] = nn.Parameter(down)
        self.lora_experts_B[adapter_name] = nn.Parameter(torch.zeros(num_experts, self.out_features, config.r))
        self.lora_experts_router[adapter_name] = nn.Parameter(router)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in] to [..., out], in the dtype of the base layer's output."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        base_dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_experts_A:
                result = result + self.mixture(x, name)
        return result.to(base_dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError."""
        raise ValueError(NO_MERGE)

    def __repr__(self) -> str:
        return f"lora_experts.{super().__repr__()}"

    def mixture(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """What adapter `name` adds to the base's output: [..., in] to [..., out], in the adapter's precision."""
        down, up = self.lora_experts_A[name], self.lora_experts_B[name]
        probabilities, weights = route(x, self.lora_experts_router[name], self.top_k[name])
        if self.routing_log is not None and name == self.routing_adapter:
            self.routing_log.note(self.routing_name, probabilities, weights)
        inputs = self.lora_dropout[name](self._cast_input_dtype(x, down.dtype))
        hidden = F.linear(inputs, down.flatten(0, 1))
        hidden = hidden.reshape(*weights.shape, self.r[name]) * weights.to(hidden.dtype).unsqueeze(-1)  # [..., n, r]
        return F.linear(hidden.flatten(-2), up.transpose(0, 1).flatten(1)) * self.scaling[name]


def route(x: torch.Tensor, router: torch.Tensor, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's probabilities over the experts, and the weights after keeping the top_k largest; both [..., n].

    x [..., in], router [n, in]; float32, or the router's dtype where that is wider. Each row of the weights sums to 1
    and, with top_k, exactly that many of them are kept, among equals too.
    """
    dtype = torch.promote_types(router.dtype, torch.float32)
    with _without_autocast(x.device.type):
        probabilities = F.linear(x.to(dtype), router.to(dtype)).softmax(dim=-1)
        if top_k is None:
            return probabilities, probabilities
        largest, kept = probabilities.topk(top_k, dim=-1)
        shares = largest / largest.sum(dim=-1, keepdim=True)
        return probabilities, torch.zeros_like(probabilities).scatter(-1, kept, shares)


def matrix_size(name: str, layer: Any) -> tuple[int, int]:
    """(in, out) of the linear layer that `layer` is or wraps; raises ValueError for another kind."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(base, Conv1D):  # GPT-2 keeps inputs x outputs
        inputs, outputs = base.weight.shape
        return inputs, outputs
    if isinstance(base, nn.Linear):  # bitsandbytes' layers are such, packed weights and all
        return base.in_features, base.out_features
    raise ValueError(f"target_modules: {name} is {type(base).__name__}; LoRA experts go beside linear layers only")


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
