"""Mixture of vectors (MoV) as a PEFT tuner: n IA3 vectors per site, mixed for each token.

Zadouri et al. 2023, arXiv 2309.05444, section 2. At each site, with l_i the vectors (ones at the start) and W_r the
router (n x its input, no bias, normal of deviation 0.02):

    s = softmax(W_r u)      float32, or float64 on a float64 model; one weight per vector and token
    l = sum_i s_i l_i       the vectors are merged first,
    y = l * v               then there is one multiplication, whatever n is

v is what IA3 scales (see `ia3`): the output of key and value, the input of the MLP's last layer
(`feedforward_modules`). What the router reads, u, has two readings:

    site_input    the hidden state that enters the sub-layer: the input of the key or value layer; for the MLP's last
                  layer the input of the whole MLP. The routers have n d each (d the hidden size).
    site_output   v itself, as in the authors' code: n d_k, n d_v and n d_ff.

So a block has n (d_k + d_v + d_ff) parameters in its vectors and 3 n d or n (d_k + d_v + d_ff) in its routers. GPT-2's
fused c_attn is one site, all of whose output is scaled, as with PEFT's IA3.

How we differ from the authors' code (T5, in JAX). It has one router and n vectors per site too, but routes each head of
the attention by itself, with a router of head size x n that the heads share; here a token has the same weights in all
heads. With n = 1 this is IA3.

On a bfloat16 model the backward pass needs, per site, float32 copies of what is scaled and of what the router reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_lab.errors import nearest

ROUTER_INPUTS = ("site_input", "site_output")
_ROUTER_STD = 0.02
_NOT_MERGEABLE = "the vectors of MoV are mixed anew for each token, so they cannot be merged into the weights"


class RoutingNotes(Protocol):
    """What a layer tells its routing to."""

    def note(self, name: str, probabilities: Tensor, weights: Tensor) -> None:
        """name: of the layer; probabilities and weights: (batch, tokens, n); for MoV the same tensor."""


@dataclass
class MovConfig(PeftConfig):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's configuration of MoV.

    target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's LoraConfig.
    feedforward_modules: those of the targets that are scaled at their input, as in PEFT's IA3Config.
    num_experts: n, at least 1. router_input: "site_input" or "site_output".
    fan_in_fan_out: as in IA3Config; recorded only, a layer's own kind says how it keeps its weight.

    Raises:
        ValueError: a value outside these, or a feedforward module that no target can match.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    num_experts: int = 0
    router_input: str = "site_input"

    def __post_init__(self) -> None:
        """Checks the values and makes sets of lists of names, as PEFT does."""
        super().__post_init__()
        self.peft_type = PeftType["MOV"]
        if isinstance(self.feedforward_modules, str):
            raise ValueError(f'feedforward_modules: expected a list of names, got "{self.feedforward_modules}"')
        self.feedforward_modules = set(self.feedforward_modules or ())
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if not isinstance(self.num_experts, int) or self.num_experts < 1:
            raise ValueError(f"num_experts: expected an integer >= 1, got {self.num_experts}")
        if self.router_input not in ROUTER_INPUTS:
            raise ValueError(f'router_input: no such "{self.router_input}"' + nearest(self.router_input, ROUTER_INPUTS))
        # Not simply a subset: of many full names PEFT keeps in target_modules only the ends that tell them apart.
        targets = self.target_modules
        for name in sorted(self.feedforward_modules):
            if isinstance(targets, set) and not any(_ends_with(name, t) or _ends_with(t, name) for t in targets):
                raise ValueError(f'feedforward_modules: "{name}" is not among the target modules')


class MovLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT is untyped
    """A linear layer with mixtures of vectors; those that are active multiply.

    mov_vectors, mov_router: adapter name -> (n, width of what is scaled), (n, width of what the router reads).
    routing_log: where set, told of the routing in each forward pass (also in one that checkpointing repeats), once per
    active adapter. routing_name: the layer's full name.
    """

    adapter_layer_names = ("mov_vectors", "mov_router")
    other_param_names = ("router_input",)
    # PEFT's, which is untyped:
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    get_base_layer: Callable[[], nn.Module]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: Any, adapter_name: str, config: MovConfig, *, name: str, parent: nn.Module, feedforward: bool
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        is_transposed = isinstance(base_layer, Conv1D)
        self.in_features = int(base_layer.nx if is_transposed else base_layer.in_features)
        self.out_features = int(base_layer.nf if is_transposed else base_layer.out_features)
        self.is_feedforward = feedforward
        self.routing_log: RoutingNotes | None = None
        self.routing_adapter: str | None = None
        self.routing_name = name
        self.mov_vectors = nn.ParameterDict()
        self.mov_router = nn.ParameterDict()
        self.router_input: dict[str, str] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._mlp_input: Tensor | None = None
        # A bound method, so that in a deep copy of the model each layer listens to its own MLP.
        self._mlp_hook = parent.register_forward_pre_hook(self._keep_mlp_input) if feedforward else None
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MovConfig) -> None:
        """Adds an adapter with new weights."""
        scaled = self.in_features if self.is_feedforward else self.out_features
        # An MLP begins and ends in the residual stream: what enters it is as wide as what its last layer puts out.
        entering = self.out_features if self.is_feedforward else self.in_features
        read = scaled if config.router_input == "site_output" else entering
        self.router_input[adapter_name] = config.router_input
        self.mov_vectors[adapter_name] = nn.Parameter(torch.empty(config.num_experts, scaled))
        self.mov_router[adapter_name] = nn.Parameter(torch.empty(config.num_experts, read))
        self.reset_mov_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_mov_parameters(self, adapter_name: str) -> None:
        """Vectors one; router normal, from torch's global generator."""
        nn.init.ones_(self.mov_vectors[adapter_name])
        nn.init.normal_(self.mov_router[adapter_name], std=_ROUTER_STD)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` (..., in_features); (..., out_features) in the precision of the base's output.

        Raises:
            ValueError: the last layer of an MLP is called, with router_input "site_input", without the MLP.
        """
        mlp_input, self._mlp_input = self._mlp_input, None
        names = self._active_names()
        if not names:
            result: Tensor = self.base_layer(x, *args, **kwargs)
        elif self.is_feedforward:
            result = self.base_layer(self._scaled(x, names, entering=mlp_input), *args, **kwargs)
        else:
            result = self._scaled(self.base_layer(x, *args, **kwargs), names, entering=x)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always a ValueError (a single vector could be merged: use IA3 for it)."""
        raise ValueError(_NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, and the MLP is listened to no more; PEFT calls this where a layer has it."""
        if merge:
            self.merge(safe_merge, adapter_names)
        if self._mlp_hook is not None:
            self._mlp_hook.remove()
        return self.get_base_layer()

    def _active_names(self) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.mov_vectors]

    def _keep_mlp_input(self, _mlp: nn.Module, args: tuple[Tensor, ...]) -> None:
        if any(self.router_input[name] == "site_input" for name in self._active_names()):
            self._mlp_input = args[0]

    def _scaled(self, v: Tensor, names: Sequence[str], *, entering: Tensor | None) -> Tensor:
        dtype = torch.promote_types(v.dtype, torch.float32)
        with _no_autocast(v.device):
            scaled = v.to(dtype)
            for name in names:
                read = v if self.router_input[name] == "site_output" else entering
                if read is None:
                    raise ValueError(f"{self.routing_name}: its router reads the MLP's input; call the whole MLP")
                scaled = scaled * self._mixed_vector(name, read.to(dtype))
            return scaled.to(v.dtype)

    def _mixed_vector(self, name: str, read: Tensor) -> Tensor:
        """`read` (..., width of the router); (..., width of what is scaled), both in the router's precision."""
        s = functional.linear(read, self.mov_router[name].to(read.dtype)).softmax(dim=-1)
        if self.routing_log is not None and name == self.routing_adapter:
            self.routing_log.note(self.routing_name, s, s)
        vectors: Tensor = self.mov_vectors[name].to(read.dtype)
        return s @ vectors


class MovModel(BaseTuner):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's model of mixtures of vectors."""

    prefix = "mov_"
    tuner_layer_cls = MovLayer
    target_module_mapping: Mapping[str, list[str]] = MappingProxyType({})

    def _check_merge_allowed(self) -> None:
        raise ValueError(_NOT_MERGEABLE)

    def _create_and_replace(
        self,
        peft_config: MovConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        feedforward = any(_ends_with(current_key, name) for name in peft_config.feedforward_modules or ())
        if isinstance(target, MovLayer):
            if target.is_feedforward != feedforward:
                raise ValueError(f"{current_key}: feedforward in one adapter of the model and not in another")
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, (nn.Linear, Conv1D)):  # bitsandbytes' layers are kinds of nn.Linear
            raise ValueError(f"{current_key}: MoV needs a linear layer, got {type(target).__name__}")
        layer = MovLayer(target, adapter_name, peft_config, name=current_key, parent=parent, feedforward=feedforward)
        if adapter_name not in self.active_adapters:  # a further adapter is not trained until it is chosen
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast would turn the router's product back into half precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
