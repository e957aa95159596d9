"""Bytes of live tensors, counted operation by operation: what "allocated" means where there is no allocator to ask.

On CUDA the allocator keeps this number. On a CPU it is counted here, on a probe step: every storage that an operation
returns is added, and taken off when the last tensor that uses it dies. Buffers that live only inside one operation
(workspace of a matrix product, the dequantised copy inside a 4-bit product) are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind the tensors, each storage counted once."""
    return sum({id(one): one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the constants that 4-bit parameters carry beside their packed values."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        for owner, names in ((state, ("absmax", "code", "offset")), (nested, ("absmax", "code"))):
            tensors += [value for name in names if isinstance(value := getattr(owner, name, None), Tensor)]
    return tensors


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Counts live bytes within its block. `peak_bytes` starts at, and never falls below, `baseline` tensors' bytes."""

    def __init__(self, baseline: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = weakref.WeakSet[torch.UntypedStorage]()
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        for tensor in baseline:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live_bytes -= size
