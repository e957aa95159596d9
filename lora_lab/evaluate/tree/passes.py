"""How a token tree is cut into forward passes.

A pass reads `rows`, each a part of the tree that is closed under ancestors except for `prefix` tokens, whose keys and
values earlier passes have kept. Costs are counted in tokens of the model's linear layers, so that one row of n tokens
behind a prefix of p costs

    n + attention * n * (p + n)

because the tree mask lets no entry be skipped; a pass costs `overhead` more. Three ways lead past a chain of m tokens
that is followed by b tokens in branches, and the cheapest is taken:

    whole     one row                        (m + b) + attention * (m + b) * (p + m + b)
    kept      the chain's keys and values    m + b + attention * (m * (p + m) + b * (p + m + r)) + 2 overhead
    repeated  the chain in each of k rows    k m + b + attention * (k m + b) * (p + r),   k = ceil(b / (r - m))

with rows of at most r tokens. So attention grows with the square of a row's length, recomputed prefixes with the number
of rows, and what is left between the two decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from lora_lab.evaluate.tree.token_tree import Nodes, TokenTree

# Where the tree has at least this share of the tokens of the distinct inputs, rows of single inputs do as well.
FLAT_FROM = 0.8


@dataclass(frozen=True, slots=True)
class Costs:
    """attention: one query-key pair of all layers; overhead: one pass; both in tokens of the linear layers."""

    attention: float
    overhead: float


@dataclass(frozen=True, slots=True)
class Budget:
    """chunk_tokens: of one pass, all rows with their padding; row_tokens: of a row, where a tree can be cut."""

    chunk_tokens: int
    row_tokens: int


@dataclass(frozen=True, slots=True)
class Pass:
    """prefix: how many kept tokens stand before each row. rows: nodes in ascending order. keep: the one row, a chain,
    extends the kept prefix. causal: each row is one chain from the first token on, so no mask is needed."""

    prefix: int
    rows: tuple[Nodes, ...]
    keep: bool = False
    causal: bool = False

    @property
    def tokens(self) -> int:
        """Tokens read, without padding."""
        return sum(len(row) for row in self.rows)


def plan_passes(tree: TokenTree, budget: Budget, costs: Costs) -> list[Pass]:
    """Passes in the order they are to run: kept prefixes grow and are cut back along a depth-first walk."""
    if tree.size >= FLAT_FROM * tree.flat_tokens:
        return list(_batches(0, tree.paths, budget.chunk_tokens, causal=True))
    return list(_Planner(tree, budget, costs).passes())


@dataclass(frozen=True, slots=True)
class _Branch:
    """Subtrees of `roots` below a kept prefix, which `chain` extends first."""

    prefix: int
    chain: Nodes
    roots: list[int]


class _Planner:
    def __init__(self, tree: TokenTree, budget: Budget, costs: Costs) -> None:
        self._tree, self._budget, self._costs = tree, budget, costs

    def passes(self) -> Iterator[Pass]:
        none = np.empty(0, dtype=np.int64)
        waiting = [_Branch(0, none, self._tree.siblings(0, self._tree.size))]
        while waiting:
            branch = waiting.pop()
            if len(branch.chain):
                yield Pass(branch.prefix, (branch.chain,), keep=True, causal=branch.prefix == 0)
            prefix = branch.prefix + len(branch.chain)
            units, below = self._cut(branch.roots, prefix)
            rows = _packed(units, self._budget.row_tokens)
            yield from _batches(prefix, rows, self._budget.chunk_tokens, causal=False)
            waiting += reversed(below)

    def _cut(self, roots: list[int], prefix: int) -> tuple[list[Nodes], list[_Branch]]:
        """Rows below a prefix, and the branches that keep more of it."""
        units: list[Nodes] = []
        below: list[_Branch] = []
        waiting: list[tuple[Nodes, list[int]]] = [(np.empty(0, dtype=np.int64), [root]) for root in reversed(roots)]
        while waiting:
            stem, group = waiting.pop()
            unit = np.concatenate((stem, np.arange(group[0], self._tree.ends[group[-1]])))
            if len(group) > 1 or len(unit) <= self._budget.row_tokens:
                units.append(unit)
                continue
            length = self._tree.chain(group[0])
            longer, end = unit[: len(stem) + length], group[0] + length
            children = self._tree.siblings(end, int(self._tree.ends[group[0]]))
            way = self._cheapest(prefix, len(longer), len(unit) - len(longer))
            if way == "whole":
                units.append(unit)
            elif way == "kept":
                below.append(_Branch(prefix, longer, children))
            else:
                waiting += [(longer, part) for part in reversed(self._grouped(children, len(longer)))]
        return units, below

    def _cheapest(self, prefix: int, chain: int, branches: int) -> str:
        pair, overhead, room = self._costs.attention, self._costs.overhead, self._budget.row_tokens
        total = chain + branches
        if not branches:
            return "whole"
        costs = {}
        if total <= self._budget.chunk_tokens:
            costs["whole"] = total + pair * total * (prefix + total)
        longest = prefix + chain + min(room, branches)
        costs["kept"] = total + pair * (chain * (prefix + chain) + branches * longest) + 2 * overhead
        if chain < room:
            repeated = ceil(branches / (room - chain)) * chain + branches
            costs["repeated"] = repeated + pair * repeated * (prefix + room)
        return min(costs, key=costs.__getitem__)

    def _grouped(self, children: Sequence[int], stem: int) -> list[list[int]]:
        """Neighbours that fit into one row behind `stem` tokens."""
        groups: list[list[int]] = []
        room = 0
        for child in children:
            size = int(self._tree.ends[child]) - child
            if size > room:
                groups.append([])
                room = self._budget.row_tokens - stem
            groups[-1].append(child)
            room = 0 if size > room else room - size
        return groups


def _packed(units: Sequence[Nodes], room: int) -> list[Nodes]:
    """Units put into as few rows of `room` tokens as first-fit decreasing finds; a longer unit has a row of its own.

    Units in a row do not see each other: they meet in no ancestor but the kept prefix and repeated chains. Two units
    that repeat the same chain stay apart, because a row holds each node once.
    """
    rows: list[list[Nodes]] = []
    used: list[int] = []
    firsts: list[set[int]] = []
    for unit in sorted(units, key=lambda nodes: (-len(nodes), int(nodes[0]))):
        first = int(unit[0])
        place = next(
            (row for row in range(len(rows)) if used[row] + len(unit) <= room and first not in firsts[row]),
            None,
        )
        if place is None:
            rows.append([])
            used.append(0)
            firsts.append(set())
            place = len(rows) - 1
        rows[place].append(unit)
        used[place] += len(unit)
        firsts[place].add(first)
    return [np.sort(np.concatenate(row)) for row in rows]


def _batches(prefix: int, rows: Sequence[Nodes], chunk_tokens: int, *, causal: bool) -> Iterator[Pass]:
    """Rows of like length together, the longest first, at most `chunk_tokens` with padding."""
    ordered = sorted(rows, key=lambda row: (-len(row), int(row[0])))
    start = 0
    while start < len(ordered):
        count = max(1, chunk_tokens // len(ordered[start]))
        yield Pass(prefix, tuple(ordered[start : start + count]), causal=causal)
        start += count
