"""A trial's base model without weights: fake tensors, which have shape, dtype and size, and no values.

Modules, dtypes, ties and quantized layers are those that `models.load` would load; nothing is read from a disk but a
folder's config.json, and nothing of the weights' size is allocated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from lora_lab.errors import LabError, first_line
from lora_lab.models.load import DROPOUT_KEYS, DTYPES, bitsandbytes_config, set_embeddings
from lora_lab.models.quiet import quiet_transformers
from lora_lab.models.shape_config import shape_config
from lora_lab.predict.fake_quantized import fake_four_bit, fake_int8
from lora_lab.schema.model import FolderModel
from lora_lab.schema.trial import Trial


class Unpredictable(Exception):  # noqa: N818 - it is an answer, not a fault
    """Memory cannot be predicted; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def model_config(trial: Trial) -> Any:
    """transformers' configuration of the trial's model: from a folder's config.json, else from the declared shape.

    Raises:
        Unpredictable: neither is there.
    """
    model = trial.model
    if isinstance(model, FolderModel):
        with quiet_transformers():
            return AutoConfig.from_pretrained(Path(model.path).expanduser(), trust_remote_code=False)
    if model.shape is None:
        raise Unpredictable(f"the shape of {model.name or model.kind} is not known without its files")
    return shape_config(model.shape)


def fake_mode() -> FakeTensorMode:
    """For everything of one prediction. Real tensors (token ids, masks) may meet fake ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_base(trial: Trial, config: Any, mode: FakeTensorMode) -> Any:
    """The frozen base model of a trial, on fake tensors of `mode`, as `models.load.load_base` would have it.

    config: see `model_config`; its number of layers may have been changed. Its dropouts are set to 0.

    Raises:
        Unpredictable: transformers cannot build it from the configuration.
    """
    for key in DROPOUT_KEYS:
        if getattr(config, key, None):
            setattr(config, key, 0.0)
    config._attn_implementation = "sdpa"
    dtype = DTYPES[trial.training.precision]
    try:
        with quiet_transformers(), torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, LabError) as error:
        reason = first_line(error).partition(". ")[0]
        raise Unpredictable(f"a {config.model_type} model cannot be built from its configuration: {reason}") from None
    network.tie_weights()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    set_embeddings(network, trial.model)
    _quantize(network, trial, dtype)
    to_fake(network, mode)
    if trial.quantization.kind == "int8":
        fake_int8(network, mode)
    elif trial.quantization.kind != "none":
        fake_four_bit(network, trial.quantization, dtype, mode)
    network.requires_grad_(False)
    network.config.use_cache = False
    network.config.pad_token_id = network.config.pad_token_id or 0
    return network


def _quantize(network: Any, trial: Trial, dtype: torch.dtype) -> None:
    """bitsandbytes' layers in place of the linear ones, on the meta device, as transformers' loader puts them."""
    settings = bitsandbytes_config(trial.quantization, dtype)
    if settings is None:
        return
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        replace_with_bnb_linear(network, ["lm_head"], settings)
    for layer in network.modules():
        if getattr(layer, "source_cls", None) is not None and layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)  # biases are not quantized
    network.is_quantized = True
    network.is_loaded_in_8bit = trial.quantization.kind == "int8"
    network.is_loaded_in_4bit = not network.is_loaded_in_8bit


def to_fake(network: nn.Module, mode: FakeTensorMode) -> None:
    """Frozen fake tensors in the place of meta tensors; what was shared stays shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=False)
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextlib.contextmanager
def fakes_move_as_modules() -> Iterator[None]:
    """Within the block `module.to(...)` puts new parameters in the place of fake ones.

    torch swaps a FakeTensor's contents in place, which the mode's own weak references to it forbid. PEFT moves each new
    adapter to the device of its layer.
    """
    original = nn.Module._apply

    def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            apply(child, change)
        for name, parameter in module._parameters.items():
            if parameter is not None and (changed := change(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(changed.detach(), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
