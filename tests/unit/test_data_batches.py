"""The order of examples is a pure function of its arguments; padding stays small; masks follow lengths."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.data.batches import Batches, collate
from lora_lab.data.encode import Encoded
from lora_lab.errors import DataError, InputError


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], dict[str, int]]:
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=120))
    micro_batch_size = draw(st.integers(1, 6))
    sizes = {
        "batch_size": micro_batch_size * draw(st.integers(1, 6)),
        "micro_batch_size": micro_batch_size,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "bucket_batches": draw(st.integers(1, 8)),
    }
    return lengths, sizes


def epoch_of(batches: Batches, epoch: int) -> list[list[list[int]]]:
    first = epoch * batches.steps_per_epoch
    return [batches.step(index) for index in range(first, first + batches.steps_per_epoch)]


@settings(deadline=None, max_examples=150)
@given(plans(), st.integers(0, 3))
def test_every_epoch_holds_each_example_once(plan: tuple[list[int], dict[str, int]], epoch: int) -> None:
    lengths, sizes = plan
    steps = epoch_of(Batches(lengths, **sizes), epoch)
    seen = Counter(index for step in steps for micro_batch in step for index in micro_batch)
    assert seen == Counter(range(len(lengths)))
    counts = [sum(len(micro_batch) for micro_batch in step) for step in steps]
    assert all(count == sizes["batch_size"] for count in counts[:-1])
    assert counts[-1] == (len(lengths) % sizes["batch_size"] or sizes["batch_size"])
    assert all(1 <= len(micro_batch) <= sizes["micro_batch_size"] for step in steps for micro_batch in step)


@settings(deadline=None, max_examples=150)
@given(plans(), st.integers(0, 3))
def test_micro_batch_size_changes_no_step(plan: tuple[list[int], dict[str, int]], epoch: int) -> None:
    lengths, sizes = plan
    one_by_one = epoch_of(Batches(lengths, **{**sizes, "micro_batch_size": 1}), epoch)
    cut = epoch_of(Batches(lengths, **sizes), epoch)
    assert [[index for part in step for index in part] for step in cut] == [
        [index for part in step for index in part] for step in one_by_one
    ]


@settings(deadline=None, max_examples=50)
@given(plans(), st.lists(st.integers(0, 30), min_size=1, max_size=10))
def test_steps_can_be_asked_in_any_order(plan: tuple[list[int], dict[str, int]], indices: list[int]) -> None:
    lengths, sizes = plan
    straight = Batches(lengths, **sizes)
    in_order = [straight.step(index) for index in range(31)]
    resumed = Batches(lengths, **sizes)
    assert [resumed.step(index) for index in indices] == [in_order[index] for index in indices]


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(0, 3))
def test_no_micro_batch_computes_more_than_the_longest(plan: tuple[list[int], dict[str, int]], epoch: int) -> None:
    lengths, sizes = plan
    batches = Batches(lengths, **sizes)

    def tokens(micro_batch: list[int]) -> int:
        return len(micro_batch) * max(lengths[index] for index in micro_batch)

    probe = batches.longest_micro_batch()
    assert len(set(probe)) == min(sizes["micro_batch_size"], len(lengths))
    assert all(tokens(part) <= tokens(probe) for step in epoch_of(batches, epoch) for part in step)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    lengths = list(range(1, 60))
    random.seed(1)
    first = Batches(lengths, batch_size=8, micro_batch_size=4, seed=0, bucket_batches=2).step(0)
    state = random.getstate()
    random.seed(2)
    assert Batches(lengths, batch_size=8, micro_batch_size=4, seed=0, bucket_batches=2).step(0) == first
    random.seed(1)
    assert random.getstate() == state


def test_seed_and_epoch_change_the_order() -> None:
    lengths = [10] * 40
    batches = Batches(lengths, batch_size=8, micro_batch_size=8, seed=0, bucket_batches=4)
    other = Batches(lengths, batch_size=8, micro_batch_size=8, seed=1, bucket_batches=4)
    assert epoch_of(batches, 0) != epoch_of(other, 0)
    assert epoch_of(batches, 0) != epoch_of(batches, 1)


def test_order_is_the_one_that_was_released() -> None:
    """A changed order changes every trained adapter: whoever changes it raises NUMERICS_VERSION."""
    batches = Batches([5, 1, 4, 2, 3, 6, 7], batch_size=2, micro_batch_size=1, seed=7, bucket_batches=2)
    first_epoch, second_epoch = (
        [batches.step(index) for index in range(4)],
        [batches.step(index) for index in range(4, 8)],
    )
    assert first_epoch == [[[2], [1]], [[0], [3]], [[6], [5]], [[4]]]
    assert second_epoch == [[[4], [1]], [[6], [5]], [[2], [3]], [[0]]]


def like_instructions(count: int, seed: int) -> list[int]:
    """Token counts with the long tail of instruction data: log-normal, median 110."""
    generator = random.Random(seed)
    return [max(8, min(1300, round(generator.lognormvariate(4.7, 0.5)))) for _ in range(count)]


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_padding_is_below_five_percent_on_long_tailed_lengths(micro_batch_size: int) -> None:
    lengths = like_instructions(4000, 0)
    sizes = {"batch_size": 8, "micro_batch_size": micro_batch_size, "seed": 0}
    bucketed = Batches(lengths, **sizes, bucket_batches=64).padding_share(0)
    assert bucketed < 0.05
    shuffled = Batches(lengths, **{**sizes, "micro_batch_size": 8}, bucket_batches=1).padding_share(0)
    assert shuffled > 0.3  # what bucketing saves


def test_padding_share_in_closed_form() -> None:
    batches = Batches([4, 2, 1], batch_size=3, micro_batch_size=3, seed=0, bucket_batches=1)
    assert batches.padding_share(0) == 1 - 7 / 12
    assert Batches([4, 2, 1], batch_size=3, micro_batch_size=1, seed=0, bucket_batches=1).padding_share(0) == 0


def test_short_batch_is_not_biased_to_long_rows() -> None:
    lengths = [*range(1, 12)] * 7
    sums = []
    for seed in range(300):
        batches = Batches(lengths, batch_size=8, micro_batch_size=8, seed=seed, bucket_batches=4)
        last = batches.step(batches.steps_per_epoch - 1)[0]
        sums += [lengths[index] for index in last]
    assert len(sums) == 300 * 5
    assert abs(sum(sums) / len(sums) - 6) < 0.3  # mean 6, standard error 0.08


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"micro_batch_size: must divide batch_size \(8\), got 3"):
        Batches([1], batch_size=8, micro_batch_size=3, seed=0, bucket_batches=1)
    with pytest.raises(InputError) as raised:
        Batches([1], batch_size=0, micro_batch_size=0, seed=0, bucket_batches=0)
    assert len(raised.value.problems) == 3
    with pytest.raises(DataError, match="0 examples"):
        Batches([], batch_size=1, micro_batch_size=1, seed=0, bucket_batches=1)
    with pytest.raises(ValueError, match="step index"):
        Batches([1], batch_size=1, micro_batch_size=1, seed=0, bucket_batches=1).step(-1)


def test_collate_pads_on_the_right_and_keeps_a_real_pad_token() -> None:
    pad = 2
    batch = collate(
        [
            Encoded((5, 6, pad), (False, True, True), False),
            Encoded((7, pad), (False, True), False),
        ],
        pad,
        "cpu",
    )
    assert batch.input_ids.tolist() == [[5, 6, 2], [7, 2, 2]] and batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]] and batch.attention_mask.dtype == torch.int64
    assert batch.loss_mask.tolist() == [[False, True, True], [False, True, False]]
    assert batch.lengths == (3, 2) and batch.loss_tokens == 3
