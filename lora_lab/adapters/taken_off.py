"""Adapters put on a loaded base for a while; afterwards the base is what it was, whatever the kind of adapter.

PEFT's own `unload` refuses IA3 on a quantized base, and leaves flags, methods and settings behind; here the model's
modules, tensors, hooks and attributes are noted before and put back, so that no kind needs a way of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from lora_lab.adapters.save import load_adapter


@contextlib.contextmanager
def adapter_on(base: Any, folder: Path) -> Iterator[PeftModel]:
    """`base` with the adapter of `folder`, which is off again afterwards, also after an error.

    The values of the base's tensors are left alone: what is put back is which tensors and modules stand where. So
    nothing may be merged or trained meanwhile. The PeftModel must not be used any more afterwards.

    Raises:
        InputError: see `load_adapter`.
    """
    before = _Before(base)
    try:
        yield load_adapter(base, folder)
    finally:
        before.put_back()


class _Before:
    """What hangs on a model: of each module all attributes, of each configuration all values, of parameters flags."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _copied(vars(module))) for module in model.modules()]
        owned = (value for module in model.modules() for value in vars(module).values())
        configs = {id(value): value for value in owned if isinstance(value, PreTrainedConfig)}
        self._configs = [(config, _copied(vars(config))) for config in configs.values()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back(self) -> None:
        for owner, attributes in [*self._modules, *self._configs]:
            _restore(vars(owner), attributes)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Tables and sets are changed in place, so they are copied; what is in them is not."""
    return {key: value.copy() if isinstance(value, (dict, set)) else value for key, value in attributes.items()}


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        current: Any = now.get(key)
        if isinstance(value, (dict, set)) and type(current) is type(value):
            current.clear()  # the same table: handles of hooks point to it
            current.update(value)
        else:
            now[key] = value
