"""Bytes of live tensors, counted operation by operation: what "allocated" means where there is no allocator to ask.

On CUDA the allocator keeps this number. On a CPU it is counted here, on a probe step: every storage that an operation
returns is added, and taken off when the last tensor that uses it dies. Tensors may be real or fake (shapes without
values), so a step is measured and predicted by the same count. Buffers that live only inside one operation (workspace
of a matrix product, the dequantised copy inside a 4-bit product) are not seen, unless it is said how large they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lab.plan.timeline import START, Event, Place, Timeline

# PyTorch's CUDA allocator hands out memory in blocks of this many bytes.
CUDA_BLOCK_BYTES = 512


def storage_bytes(tensors: Iterable[Tensor], *, block_bytes: int = 1) -> int:
    """Bytes behind the tensors, each storage counted once and rounded up to a multiple of `block_bytes`."""
    sizes = {id(one): one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}
    return sum(-(-size // block_bytes) * block_bytes for size in sizes.values())


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the constants that 4-bit parameters carry beside their packed values."""
    return [*model.parameters(), *model.buffers(), *quantization_constants(model)]


def quantization_constants(model: nn.Module) -> list[Tensor]:
    """What 4-bit parameters carry beside their packed values."""
    return [constant for parameter in model.parameters() for constant in constants_of(parameter)]


def constants_of(parameter: Tensor) -> list[Tensor]:
    """Scales, offsets and code books of a 4-bit parameter; none of any other."""
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    owners = ((state, ("absmax", "code", "offset")), (nested, ("absmax", "code")))
    found = [getattr(owner, name, None) for owner, names in owners for name in names]
    return [value for value in found if isinstance(value, Tensor)]


# Of an operation, the bytes of a buffer that lives in it and nowhere else, by its arguments.
Inside = Mapping[Any, Callable[..., int]]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Counts live bytes within its block, and keeps when which came and went.

    known: tensors that are alive before, with their part (see `plan.timeline.PARTS`), in the order in which they came.
    `peak_bytes` starts at, and never falls below, their bytes. block_bytes: sizes are rounded up to a multiple of it.
    inside: buffers within operations, beside their results. `place`: set it as the step goes on.
    """

    def __init__(
        self,
        known: Iterable[tuple[str, Iterable[Tensor]]],
        *,
        block_bytes: int = 1,
        inside: Inside = MappingProxyType({}),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inside = inside
        self._numbers = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()
        self._block = block_bytes
        self._events: list[Event] = []
        self._parts: dict[int, str] = {}
        self._count_of_storages = 0
        self.place: Place = START
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        for part, tensors in known:
            for tensor in tensors:
                self._count(tensor)
                self.claim(part, [tensor])

    def claim(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Says what the bytes of tensors are, where nobody has said so before."""
        for tensor in tensors:
            number = self._numbers.get(tensor.untyped_storage())
            if number is not None:
                self._parts.setdefault(number, part)

    def claim_live(self, part: str) -> None:
        """The same of all that is alive now."""
        for number in list(self._numbers.values()):
            self._parts.setdefault(number, part)

    def timeline(self) -> Timeline:
        """What has been recorded so far."""
        return Timeline(tuple(self._events), dict(self._parts))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._count(result)
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        if func in self._inside:
            self._count_inside(self._inside[func](*args, **(kwargs or {})))
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._numbers:
            return
        number, size = self._born(storage.nbytes())
        self._numbers[storage] = number
        weakref.finalize(storage, self._change, number, -size).atexit = False

    def _count_inside(self, size: int) -> None:
        number, rounded = self._born(size)
        self._change(number, -rounded)

    def _born(self, size: int) -> tuple[int, int]:
        """Number and rounded size of a new storage, which is counted."""
        number = self._count_of_storages
        self._count_of_storages += 1
        rounded = -(-size // self._block) * self._block
        self._change(number, rounded)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return number, rounded

    def _change(self, number: int, size: int) -> None:
        if size:
            self.live_bytes += size
            self._events.append(Event(number, size, self.place))
