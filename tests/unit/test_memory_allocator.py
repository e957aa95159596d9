"""The allocator's simulation against examples worked by hand, and against a slow one that searches a list."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import pytest

from lora_lab.memory.allocator import AllocatorPeaks, allocator_peaks, reserved_peak, segment_bytes
from lora_lab.plan.timeline import START, Event

KIB, MIB = 2**10, 2**20


def events(*changes: tuple[int, int]) -> list[Event]:
    return [Event(storage, change, START) for storage, change in changes]


def births(*sizes: int) -> list[Event]:
    return events(*enumerate(sizes))


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB),  # rounded to 512 first, it is no longer below 10 MiB
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (131_072_000, 126 * MIB),  # 125 MiB: a vocabulary of 32,000 by 1,024 in fp32
    ],
)
def test_segments(size: int, segment: int) -> None:
    assert segment_bytes(size) == segment
    assert reserved_peak(births(size)) == segment


def test_nothing_reserves_nothing_and_neither_do_storages_of_no_bytes() -> None:
    assert allocator_peaks([]) == AllocatorPeaks(0, 0)
    assert allocator_peaks(events((1, 0), (1, 0))) == AllocatorPeaks(0, 0)


def test_small_storages_share_segments_of_two_mib() -> None:
    assert reserved_peak(births(*[512] * 4096)) == 2 * MIB
    assert reserved_peak(births(*[512] * 4097)) == 4 * MIB
    # 513 bytes take 1024, so that half as many share a segment.
    assert reserved_peak(births(*[513] * 2048)) == 2 * MIB
    assert reserved_peak(births(*[513] * 2049)) == 4 * MIB


def test_the_small_pool_lends_nothing_to_the_large_one() -> None:
    assert reserved_peak(births(512, 2 * MIB)) == 22 * MIB
    freed = events((0, 2 * MIB), (0, -2 * MIB), (1, 512))
    assert reserved_peak(freed) == 22 * MIB


def test_medium_storages_share_segments_of_twenty_mib() -> None:
    assert reserved_peak(births(*[5 * MIB] * 4)) == 20 * MIB
    assert reserved_peak(births(*[5 * MIB] * 5)) == 40 * MIB
    # Three of 6 MiB leave 2 MiB, in which a fourth does not fit.
    assert reserved_peak(births(*[6 * MIB] * 3)) == 20 * MIB
    assert reserved_peak(births(*[6 * MIB] * 4)) == 40 * MIB


def test_cublas_workspace_is_what_a_memory_snapshot_of_pytorch_shows() -> None:
    """discuss.pytorch.org/t/178671: total_size 20971520, allocated_size 8519680; 12451840 inactive can be used."""
    assert allocator_peaks(births(8_519_680)) == AllocatorPeaks(8_519_680, 20_971_520)
    assert reserved_peak(births(8_519_680, 12_451_840 - 2 * MIB, 2 * MIB)) == 20_971_520
    assert reserved_peak(births(8_519_680, 12_451_840 - 2 * MIB, 2 * MIB + 512)) == 2 * 20_971_520


def test_a_rest_of_the_large_pool_is_split_off_above_one_mib_only() -> None:
    # A segment of 12 MiB for 11 MiB: the rest of exactly 1 MiB stays with the block and counts as allocated.
    assert allocator_peaks(births(11 * MIB)) == AllocatorPeaks(12 * MIB, 12 * MIB)
    # 512 bytes less, and it is a block of its own, though of a size that the large pool is never asked for ...
    assert allocator_peaks(births(11 * MIB - 512)) == AllocatorPeaks(11 * MIB - 512, 12 * MIB)
    # ... but one that serves 1 MiB + 512 bytes, the smallest request of that pool.
    assert reserved_peak(births(11 * MIB - 512, MIB + 512)) == 12 * MIB
    assert reserved_peak(births(11 * MIB, MIB + 512)) == 32 * MIB


def test_the_small_pool_splits_off_the_last_512_bytes() -> None:
    # 1 MiB, and 1 MiB less 512: the last 512 bytes of the segment are still a block.
    assert reserved_peak(births(MIB, MIB - 512, 512)) == 2 * MIB
    assert reserved_peak(births(MIB, MIB - 512, 513)) == 4 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    # Free blocks of 30 and 20 MiB. 18 MiB must go to the second, so that 30 MiB still find the first.
    freed = events((0, 30 * MIB), (1, 20 * MIB), (0, -30 * MIB), (1, -20 * MIB), (2, 18 * MIB), (3, 30 * MIB))
    assert reserved_peak(freed) == 50 * MIB
    # The other way round they fragment: 22 MiB take from the 30, and nothing is left for 24.
    freed = events((0, 30 * MIB), (1, 20 * MIB), (0, -30 * MIB), (1, -20 * MIB), (2, 22 * MIB), (3, 24 * MIB))
    assert reserved_peak(freed) == 74 * MIB


def test_free_neighbours_become_one_block_again() -> None:
    quarters = [(number, 5 * MIB) for number in range(4)]
    freed = [(number, -5 * MIB) for number in (0, 2, 1, 3)]
    assert reserved_peak(events(*quarters, *freed, (9, 20 * MIB))) == 20 * MIB
    # A quarter in use between them keeps them apart: 15 MiB are free, in pieces of 5 and 10.
    assert reserved_peak(events(*quarters, (0, -5 * MIB), (2, -5 * MIB), (3, -5 * MIB), (9, 11 * MIB))) == 32 * MIB
    assert reserved_peak(events(*quarters, (0, -5 * MIB), (2, -5 * MIB), (3, -5 * MIB), (9, 10 * MIB))) == 20 * MIB


def test_neighbours_of_two_segments_stay_apart() -> None:
    assert (
        reserved_peak(events((0, 20 * MIB), (1, 20 * MIB), (0, -20 * MIB), (1, -20 * MIB), (2, 40 * MIB))) == 80 * MIB
    )


def test_segments_are_kept() -> None:
    assert reserved_peak(events((0, 40 * MIB), (0, -40 * MIB), (1, 50 * MIB))) == 90 * MIB
    assert allocator_peaks(events((0, 40 * MIB), (0, -40 * MIB), (1, 50 * MIB))).allocated == 50 * MIB


def test_a_storage_number_may_be_used_again_once_it_is_dead() -> None:
    assert reserved_peak(events((0, 40 * MIB), (0, -40 * MIB), (0, 30 * MIB))) == 40 * MIB


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (((7, 512), (7, 512)), "storage 7 comes alive twice"),
        (((7, 512), (7, -512), (7, -512)), "storage 7 dies without being alive"),
    ],
)
def test_events_that_cannot_happen_are_refused(wrong: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reserved_peak(events(*wrong))


class _Slow:
    """The same rules over plain lists of (start, size, number or None), one per segment, with nothing kept sorted."""

    def __init__(self) -> None:
        self.segments: list[list[list[int | None]]] = []

    def born(self, number: int, size: int) -> None:
        size = -(-size // 512) * 512
        is_small = size <= MIB
        fits = [
            (block[1], index, position)
            for index, segment in enumerate(self.segments)
            if (sum(b[1] or 0 for b in segment) == 2 * MIB) == is_small
            for position, block in enumerate(segment)
            if block[2] is None and (block[1] or 0) >= size
        ]
        if not fits:
            own = 2 * MIB if is_small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments.append([[0, own, None]])
            fits = [(own, len(self.segments) - 1, 0)]
        total, index, position = min(fits, key=lambda fit: (fit[0] or 0, fit[1], fit[2]))
        rest = (total or 0) - size
        is_split = rest >= 512 if is_small else rest > MIB
        taken: list[list[int | None]] = [[0, size, number], [0, rest, None]] if is_split else [[0, total, number]]
        self.segments[index][position : position + 1] = taken

    def died(self, number: int) -> None:
        for segment in self.segments:
            for block in segment:
                if block[2] == number:
                    block[2] = None
            merged: list[list[int | None]] = []
            for block in segment:
                if merged and merged[-1][2] is None and block[2] is None:
                    merged[-1][1] = (merged[-1][1] or 0) + (block[1] or 0)
                else:
                    merged.append(block)
            segment[:] = merged

    def reserved(self) -> int:
        return sum(block[1] or 0 for segment in self.segments for block in segment)

    def allocated(self) -> int:
        return sum(block[1] or 0 for segment in self.segments for block in segment if block[2] is not None)


def churn(seed: int, length: int, largest: int) -> list[Event]:
    chance = random.Random(seed)
    live: dict[int, int] = {}
    found = []
    for number in range(length):
        if live and chance.random() < 0.48:
            dead = chance.choice(list(live))
            found.append((dead, -live.pop(dead)))
        else:
            live[number] = int(2 ** chance.uniform(4, largest))
            found.append((number, live[number]))
    return events(*found)


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_a_slow_search(seed: int) -> None:
    # The slow one tells small segments by their 2 MiB: those of the large pool have at least 10.
    happened = churn(seed, 500, 20 + seed % 5)
    slow, allocated = _Slow(), 0
    for event in happened:
        slow.born(event.storage, event.change) if event.change > 0 else slow.died(event.storage)
        allocated = max(allocated, slow.allocated())
    assert allocator_peaks(happened) == AllocatorPeaks(allocated, slow.reserved())


def test_reserves_at_least_what_is_alive_and_never_without_bound() -> None:
    happened = churn(3, 3000, 26)
    live = peak = 0
    for event in happened:
        live += event.change
        peak = max(peak, live)
    found = allocator_peaks(happened)
    assert peak <= found.allocated <= found.reserved < 2 * peak


def test_fifty_thousand_events_take_no_time() -> None:
    happened: Iterable[Event] = churn(1, 50_000, 24)
    start = time.perf_counter()
    reserved_peak(happened)
    assert time.perf_counter() - start < 2.0
