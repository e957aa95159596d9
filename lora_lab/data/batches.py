"""Which examples each optimizer step sees, as a pure function of the step's number, and how they become tensors.

There is no iterator and so no state to save: a run that resumes at step k asks for step k.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from lora_lab.data.encode import Encoded
from lora_lab.errors import DataError, InputError, Problem


class Batches:
    """The order of a training set.

    Each epoch holds each example exactly once. It is shuffled by (seed, epoch); the last `n % batch_size` examples of
    that order are the short batch that ends the epoch, set aside before any sorting so that it is not made of long
    rows. The rest is cut into pools of `bucket_batches` batches; within a pool the examples are sorted by length and
    cut into batches, so that the rows of a batch are of like length (little padding); the batches are then shuffled.
    The examples of a step do not depend on `micro_batch_size`, which only cuts the batch (longest rows first).

    Args:
        lengths: tokens per example.
        batch_size: examples per optimizer step. micro_batch_size: per forward/backward; divides batch_size.
        seed: decides the order, together with the epoch.
        bucket_batches: batches per pool; 1 leaves batches as shuffled.

    Raises:
        InputError: sizes that do not fit. DataError: no examples.
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, micro_batch_size: int, seed: int, bucket_batches: int
    ) -> None:
        _check_sizes(batch_size, micro_batch_size, bucket_batches)
        if not lengths:
            raise DataError(Problem("data", "0 examples to train on"))
        self._lengths = tuple(lengths)
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._bucket_batches = bucket_batches
        # A memo of a pure function, not state: asking step by step must not sort the whole epoch each time.
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the short one included."""
        return -(-len(self._lengths) // self._batch_size)

    def step(self, index: int) -> list[list[int]]:
        """The micro-batches (example indices) of optimizer step `index`, counted from 0 over all epochs."""
        if index < 0:
            raise ValueError(f"step index must be >= 0, got {index}")
        epoch, position = divmod(index, self.steps_per_epoch)
        batch = self._epoch(epoch)[position]
        size = self._micro_batch_size
        return [list(batch[start : start + size]) for start in range(0, len(batch), size)]

    def padding_share(self, epoch: int) -> float:
        """Share of the tokens computed in `epoch` that are padding, in 0..1."""
        real = padded = 0
        for position in range(self.steps_per_epoch):
            for micro_batch in self.step(epoch * self.steps_per_epoch + position):
                lengths = [self._lengths[index] for index in micro_batch]
                real += sum(lengths)
                padded += max(lengths) * len(lengths)
        return 1 - real / padded

    def longest_micro_batch(self) -> list[int]:
        """The `micro_batch_size` longest examples: no micro-batch of any epoch computes more tokens than this one."""
        by_length = sorted(range(len(self._lengths)), key=lambda index: (-self._lengths[index], index))
        return by_length[: self._micro_batch_size]

    def _plan_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        digest = hashlib.sha256(f"batches:{self._seed}:{epoch}".encode()).digest()
        generator = random.Random(int.from_bytes(digest[:8], "big"))
        order = list(range(len(self._lengths)))
        generator.shuffle(order)
        full = len(order) - len(order) % self._batch_size
        pool_size = self._bucket_batches * self._batch_size
        batches: list[tuple[int, ...]] = []
        for start in range(0, full, pool_size):
            pool = self._longest_first(order[start : min(start + pool_size, full)])
            batches += [tuple(pool[cut : cut + self._batch_size]) for cut in range(0, len(pool), self._batch_size)]
        generator.shuffle(batches)
        if full < len(order):
            batches.append(tuple(self._longest_first(order[full:])))
        return batches

    def _longest_first(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda index: -self._lengths[index])  # stable: ties stay as shuffled


def _check_sizes(batch_size: int, micro_batch_size: int, bucket_batches: int) -> None:
    problems = [
        Problem(name, f"must be >= 1, got {value}")
        for name, value in (
            ("batch_size", batch_size),
            ("micro_batch_size", micro_batch_size),
            ("bucket_batches", bucket_batches),
        )
        if value < 1
    ]
    if not problems and batch_size % micro_batch_size:
        problems = [Problem("micro_batch_size", f"must divide batch_size ({batch_size}), got {micro_batch_size}")]
    if problems:
        raise InputError(problems)


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, padded on the right to its longest example.

    input_ids: int64 [B, T]. attention_mask: int64 [B, T], 1 for real tokens. loss_mask: bool [B, T], True where the
    token is a target that carries loss (never at position 0, never on padding). lengths, types: tokens and type
    of each example.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    lengths: tuple[int, ...]
    types: tuple[str | None, ...]

    @property
    def loss_tokens(self) -> int:
        """Targets that carry loss."""
        return int(self.loss_mask.sum())


def collate(examples: Sequence[Encoded], pad_id: int, device: torch.device | str) -> Batch:
    """Tensors of a micro-batch on `device`.

    Both masks come from the lengths, never from comparing with `pad_id`, so a pad token that is the end token too
    (as in SmolLM2 and GPT-2) still carries loss where it is real.
    """
    lengths = tuple(len(example.input_ids) for example in examples)
    width = max(lengths)
    input_ids = [[*example.input_ids, *[pad_id] * (width - len(example.input_ids))] for example in examples]
    loss_mask = [[*example.loss_mask, *[False] * (width - len(example.loss_mask))] for example in examples]
    attention_mask = [[1] * length + [0] * (width - length) for length in lengths]
    return Batch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64, device=device),
        attention_mask=torch.tensor(attention_mask, dtype=torch.int64, device=device),
        loss_mask=torch.tensor(loss_mask, dtype=torch.bool, device=device),
        lengths=lengths,
        types=tuple(example.type for example in examples),
    )
