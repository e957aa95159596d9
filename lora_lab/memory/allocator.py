"""CUDA's caching allocator, simulated over the events of a timeline: how much it reserves, and what it hands out.

The rules are those of PyTorch 2.13 in its default settings (c10/cuda/CUDACachingAllocator.cpp, the sizes in
c10/core/AllocatorConfig.h): every size is rounded up to 512 bytes. Up to 1 MiB a tensor lies in the small pool, whose
segments have 2 MiB. Above, it lies in the large pool: a request below 10 MiB is given a segment of 20 MiB, any other
one of its own size in steps of 2 MiB. A pool answers with its smallest free block that is large enough, at the lowest
address among equals, and asks for a new segment only where it has none. What is left of a block stays free if it has
512 bytes (small pool) or more than 1 MiB (large pool), else it goes with the block. A freed block joins its free
neighbours in the segment. Segments are kept.

Not simulated: a second stream, `expandable_segments`, and what happens when the device is full. Then PyTorch gives free
segments back and tries again, so that a run can survive on less than is reserved here, never on less than is allocated.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from lora_lab.plan.timeline import Event

_MIB = 2**20
_ROUNDING = 512
_LARGEST_SMALL = _MIB
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB
_OWN_SEGMENT_FROM = 10 * _MIB
_SEGMENT_ROUNDING = 2 * _MIB


@dataclass(frozen=True, slots=True)
class AllocatorPeaks:
    """Bytes, as `torch.cuda.max_memory_allocated` and `max_memory_reserved` tell them.

    allocated: blocks in use, with what was left of them and too small to be split off.
    """

    allocated: int
    reserved: int


def reserved_peak(events: Iterable[Event]) -> int:
    """Bytes that the allocator holds at most while `events` happen, from nothing; ValueError as `allocator_peaks`."""
    return allocator_peaks(events).reserved


def allocator_peaks(events: Iterable[Event]) -> AllocatorPeaks:
    """What the allocator hands out and holds at most while `events` happen, from nothing.

    Events of no bytes are passed over: such storages never reach the allocator.

    Raises:
        ValueError: a storage comes alive while it is, or dies while it is not.
    """
    small, large = _Pool(split_from=_ROUNDING), _Pool(split_from=_LARGEST_SMALL + 1)
    live: dict[int, tuple[_Pool, _Block]] = {}
    allocated = peak_allocated = 0
    for event in events:
        if event.change > 0:
            if event.storage in live:
                raise ValueError(f"storage {event.storage} comes alive twice")
            size = _round_up(event.change, _ROUNDING)
            pool = small if size <= _LARGEST_SMALL else large
            block = pool.allocate(size)
            live[event.storage] = pool, block
            allocated += block.size
            peak_allocated = max(peak_allocated, allocated)
        elif event.change < 0:
            if event.storage not in live:
                raise ValueError(f"storage {event.storage} dies without being alive")
            pool, block = live.pop(event.storage)
            allocated -= block.size
            pool.free(block)
    return AllocatorPeaks(peak_allocated, small.reserved + large.reserved)


def segment_bytes(size: int) -> int:
    """The segment that is asked of the device where no free block holds `size` bytes."""
    size = _round_up(size, _ROUNDING)
    if size <= _LARGEST_SMALL:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if size < _OWN_SEGMENT_FROM else _round_up(size, _SEGMENT_ROUNDING)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


class _Block:
    """A piece of a segment. before, after: its neighbours there."""

    __slots__ = ("address", "after", "before", "is_free", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.is_free = False
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Pool:
    """Segments of one kind. split_from: bytes that the rest of a block must have to become a block itself.

    A device hands out addresses of its own choice; here each segment lies above the earlier ones.
    """

    def __init__(self, *, split_from: int) -> None:
        self._split_from = split_from
        self.reserved = 0
        # Sorted by size, then address; the blocks themselves by address.
        self._free: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}

    def allocate(self, size: int) -> _Block:
        index = bisect.bisect_left(self._free, (size, 0))
        if index < len(self._free):
            block = self._blocks.pop(self._free.pop(index)[1])
        else:
            block = _Block(self.reserved, segment_bytes(size))
            self.reserved += block.size
        block.is_free = False
        if block.size - size >= self._split_from:
            self._split(block, size)
        return block

    def free(self, block: _Block) -> None:
        before, after = block.before, block.after
        if before is not None and before.is_free:
            self._forget(before)
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free:
            self._forget(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        self._keep(block)

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        self._keep(rest)

    def _keep(self, block: _Block) -> None:
        block.is_free = True
        bisect.insort(self._free, (block.size, block.address))
        self._blocks[block.address] = block

    def _forget(self, block: _Block) -> None:
        del self._free[bisect.bisect_left(self._free, (block.size, block.address))]
        del self._blocks[block.address]
