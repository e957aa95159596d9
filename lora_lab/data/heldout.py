"""Held-out rows: a seeded split that never puts equal rows on both sides, and a check of given sides. Torch-free."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence

from lora_lab.data.rows import Row, Rows
from lora_lab.errors import DataError, Problem

SHOWN_PROBLEMS = 20


def split_rows(rows: Sequence[Row], *, heldout_size: int, seed: int, where: str) -> Rows:
    """`heldout_size` rows drawn by `seed`, the others for training; both keep the order of `rows`.

    Rows of equal content are drawn together or not at all, so that nothing trained on is scored. A group of copies that
    does not fit into what is left is passed over for the next one in the shuffled order.

    Raises:
        DataError: fewer rows than asked for plus one, or copies that leave no way to hold out that many.
    """
    if heldout_size >= len(rows):
        raise DataError(
            Problem(where, f"heldout_size ({heldout_size}) must be smaller than the number of rows ({len(rows)})")
        )
    groups: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.content].append(index)
    order = list(groups.values())
    random.Random(_derived_seed("heldout", seed)).shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= heldout_size:
            chosen.update(group)
    if len(chosen) < heldout_size:
        raise DataError(
            Problem(
                where,
                f"only {len(chosen)} of heldout_size ({heldout_size}) rows can be held out without having a copy among "
                f"the training rows: {len(rows)} rows, {len(groups)} of them different",
            )
        )
    return Rows(
        train=[row for index, row in enumerate(rows) if index not in chosen],
        heldout=[row for index, row in enumerate(rows) if index in chosen],
    )


def refuse_overlap(train: Sequence[Row], heldout: Sequence[Row]) -> None:
    """Raises DataError naming the training rows that are held-out rows too (the first 20, and how many)."""
    sources = {row.content: row.source for row in heldout}
    shared = [row for row in train if row.content in sources]
    if not shared:
        return
    problems = [Problem(row.source, f"also a held-out row ({sources[row.content]})") for row in shared[:SHOWN_PROBLEMS]]
    raise DataError([*problems, *more_problems(len(shared), "training rows that are held out")])


def more_problems(count: int, noun: str) -> list[Problem]:
    """A last line for a list of problems of which only SHOWN_PROBLEMS are shown."""
    if count <= SHOWN_PROBLEMS:
        return []
    return [Problem("", f"{count} {noun} in all; the first {SHOWN_PROBLEMS} are shown")]


def count_duplicates(rows: Sequence[Row]) -> int:
    """How many rows repeat the content of an earlier one."""
    return len(rows) - len({row.content for row in rows})


def _derived_seed(purpose: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:8], "big")
