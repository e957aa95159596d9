"""What a model in memory is, as one hash: every tensor and every setting that its function depends on.

Two models of equal digest compute the same function in evaluation mode. What a base's files say is no such key: an
adapter, another alpha, a disabled adapter, a tied head given its own weight or another attention kernel are not in
them. Not covered, because the function does not depend on it: the device, names and folders, which weights are trained,
whether the model is in training mode, and who listens to its routers.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Attributes of modules and of configurations that do not change what is computed.
_BOOKKEEPING = frozenset(
    {
        # names and folders
        "name_or_path",
        "_name_or_path",
        "base_model_name_or_path",
        "tokenizer_name_or_path",
        "revision",
        "_commit_hash",
        "transformers_version",
        "peft_version",
        "architectures",
        "auto_mapping",
        # training
        "inference_mode",
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
        "loss_type",
        # transformers' notes on loading and placing a model
        "all_tied_weights_keys",
        "hf_device_map",
        "hf_quantizer",
        "_ep_plan",
        "_from_model_config",
        "_fsdp_plan",
        "_is_hf_initialized",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_save",
        "_no_split_modules",
        "_output_capturing_hooks_installed",
        "_pp_plan",
        "_skip_keys_device_placement",
        "_tp_plan",
        "_weight_conversions",
        # bitsandbytes: read in `_scales`
        "state",
        # the lab's mixtures: who listens to a router, and what a layer keeps between two calls
        "routing_adapter",
        "routing_log",
        "_mlp_hook",
        "_mlp_input",
    }
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Installed by transformers at a first forward pass; they only look.
_LOOKING = "transformers.utils.output_capturing"


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (hex) over what `model` computes with; a fresh load of the same gives the same digest.

    Covered are, of every module: its place and class, its own plain attributes (eps, scaling, active and merged
    adapters, whether they are disabled), its configuration (of transformers, generation and PEFT), its hooks by name,
    and every parameter and buffer with name, dtype, shape and bytes, those that no file holds included (scales, offsets
    and code books of quantized weights, rotary frequencies). A tensor or module in two places is hashed once; the
    second place says where the first is.

    Tensors are read one by one; no copy of the model is held. An attribute that is neither plain, a configuration, a
    function nor a tensor counts by its class only.

    Raises:
        ValueError: a tensor is on the meta device, so it has no values.
    """
    return _Digest().of(model)


class _Digest:
    """One pass over a model. Every record is preceded by its length, so that no two models spell the same bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._places: dict[int, str] = {}  # of modules and tensors, all of which the model keeps alive
        self._configs: dict[int, str] = {}

    def of(self, model: nn.Module) -> str:
        modules = sorted(model.named_modules(remove_duplicate=False), key=lambda pair: pair[0])
        for name, module in modules:
            if self._is_new(name, module):
                self._add_module(name, module)
        return self._hash.hexdigest()

    def _add_module(self, name: str, module: nn.Module) -> None:
        own = {key: value for key, value in vars(module).items() if not _is_bookkeeping(module, key, value)}
        tensors = {key: value for key, value in own.items() if isinstance(value, Tensor)}
        settings = {key: self._plain(value) for key, value in own.items() if key not in tensors}
        self._record(["module", name, _class_name(module), settings, _hooks(module)])
        tensors |= dict(module.named_parameters(recurse=False, remove_duplicate=False))
        tensors |= dict(module.named_buffers(recurse=False, remove_duplicate=False))
        for key, tensor in sorted(tensors.items()):
            place = f"{name}.{key}"
            if self._is_new(place, tensor):
                self._tensor(place, tensor)
                self._quantization(place, getattr(tensor, "quant_state", None))
        for key, scales in _scales(module):
            self._tensor(f"{name}.{key}", scales)

    def _is_new(self, place: str, entry: object) -> bool:
        first = self._places.setdefault(id(entry), place)
        if first != place:
            self._record(["again", place, first])
        return first == place

    def _quantization(self, place: str, state: Any) -> None:
        """Scales, offset and code books of a 4-bit weight, under the names that bitsandbytes saves them by."""
        if state is None:
            return
        content = state.as_dict()
        plain = {key: self._plain(value) for key, value in content.items() if not isinstance(value, Tensor)}
        # The weight may have been repacked for a CPU kernel that computes in bf16.
        repacked = bool(getattr(state, "packing_format_for_cpu", False))
        self._record(["quantized", place, plain, repacked])
        for key, tensor in sorted(content.items()):
            if isinstance(tensor, Tensor):
                self._tensor(f"{place}.{key}", tensor)

    def _tensor(self, place: str, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise ValueError(f"{place} is on the meta device: it has no values, so the model has no digest")
        self._record(["tensor", place, str(tensor.dtype), list(tensor.shape)])
        # Bytes as they are: bf16 has no type in NumPy.
        flat = tensor.data.cpu().contiguous().reshape(-1).view(torch.uint8)
        self._hash.update(flat.numpy().data)

    def _record(self, value: object) -> None:
        content = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        self._hash.update(f"{len(content)}:".encode())
        self._hash.update(content)

    def _plain(self, value: Any) -> Any:
        """`value` as JSON with one spelling."""
        if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, enum.Enum)):
            return value
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, enum.Enum):
            return [_class_name(value), value.name]
        if isinstance(value, Mapping):
            return [
                [str(key), self._plain(entry)] for key, entry in sorted(value.items(), key=lambda pair: str(pair[0]))
            ]
        if isinstance(value, (set, frozenset)):
            return sorted((self._plain(entry) for entry in value), key=json.dumps)
        if isinstance(value, (list, tuple)):
            return [self._plain(entry) for entry in value]
        if isinstance(value, torch.dtype):
            return str(value)
        if hasattr(value, "to_dict"):
            return self._config(value)
        return _name(value) if callable(value) else _class_name(value)

    def _config(self, config: Any) -> str:
        """Hash of a configuration, which every layer of a model holds."""
        known = self._configs.get(id(config))
        if known is None:
            # A model's own `to_dict` leaves out which attention it runs.
            content = vars(config) if isinstance(config, PreTrainedConfig) else config.to_dict()
            plain = {key: self._plain(value) for key, value in content.items() if key not in _BOOKKEEPING}
            text = json.dumps([_class_name(config), plain], sort_keys=True)
            known = self._configs[id(config)] = hashlib.sha256(text.encode()).hexdigest()
        return known


def _is_bookkeeping(module: nn.Module, key: str, value: Any) -> bool:
    """Also what PEFT leaves on a model after generating: settings of generation on a module that cannot generate, and a
    method that is the one its owner's class has, where the owner is the module itself, or the model inside it, which is
    asked for what the module's class does not have."""
    if key in _OF_EVERY_MODULE or key in _BOOKKEEPING:
        return True
    if key == "generation_config":
        return not hasattr(type(module), "generate")
    if not isinstance(value, MethodType) or value.__func__ is not getattr(type(value.__self__), key, None):
        return False
    return value.__self__ is module or not hasattr(type(module), key)


def _scales(module: Any) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps of an 8-bit layer beside its weight; the lab's own layer has its scales as a buffer."""
    state = getattr(module, "state", None)
    if state is None or not hasattr(state, "SCB"):
        return
    yield "threshold", torch.tensor(float(state.threshold), dtype=torch.float64)
    if "row_scales" not in dict(module.named_buffers(recurse=False)):
        scales = state.SCB if state.SCB is not None else getattr(module.weight, "SCB", None)  # moved by a first forward
        if scales is not None:
            yield "SCB", scales


def _hooks(module: nn.Module) -> list[str]:
    """Names of what runs around the module's forward pass, in its order."""
    found = [_name(hook) for kind in _HOOKS for hook in getattr(module, kind).values()]
    return [name for name in found if not name.startswith(_LOOKING)]


def _name(function: Any) -> str:
    qualified = getattr(function, "__qualname__", None)
    return _class_name(function) if qualified is None else f"{getattr(function, '__module__', '')}.{qualified}"


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
