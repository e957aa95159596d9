"""Several models over one set of weights: a copy of the modules, none of the tensors.

Whatever is put on such a copy (adapters, hooks, flags of modules, settings) stays there; the original and its other
copies do not see it. Values of tensors are shared: who writes to them writes for all.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def shared_copy(model: Any) -> Any:
    """A module tree of its own over the tensors of `model`: parameters (4-bit ones with their constants) and buffers.

    Weights that are tied stay tied. The configuration is copied. A bound method or closure that a module keeps would
    still point to the original, so copies are taken of a plain base, before anything is attached.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in _tensors(module):
            memo[id(value)] = value
    return copy.deepcopy(model, memo)


def _tensors(module: nn.Module) -> list[Any]:
    """What is shared: the module's own tensors, and the state object in which bitsandbytes keeps an 8-bit layer's."""
    found: list[Any] = [one for one in (*module._parameters.values(), *module._buffers.values()) if one is not None]
    found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    if hasattr(module, "row_scales"):
        found.append(module.state)
    return found
