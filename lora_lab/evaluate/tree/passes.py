"""How a token tree is cut into forward passes.

A pass reads `rows`, each a part of the tree that is closed under ancestors except for `prefix` tokens, whose keys and
values earlier passes have kept. Costs are counted in tokens of the model's linear layers, so that one row of n tokens
behind a prefix of p costs

    n + attention * n * (p + n)

because the tree mask lets no entry be skipped; a pass costs `overhead` more. Three ways lead past a chain of m tokens
that is followed by b tokens in branches, and the cheapest is taken:

    whole     one row                      t + attention * t * (p + t),   t = m + b
    kept      the chain's keys and values  t + attention * (m * (p + m) + b * (p + m + r)) + 2 overhead
    repeated  the chain in each of k rows  s + attention * s * (p + r),   s = k m + b,   k = ceil(b / (r - m))

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
# Rooms of rows that are tried for a pass, in parts of `row_tokens`.
_ROOMS = (0.5, 0.625, 0.75, 0.875, 1.0)


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
        return list(_batches(tree.paths, budget.chunk_tokens))
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
            yield from self._packed(prefix, units)
            waiting += reversed(below)

    def _packed(self, prefix: int, units: Sequence[Nodes]) -> Iterator[Pass]:
        """Units in rows and rows in passes. A pass's rows are given the room that makes its tokens cheapest: wide ones
        leave little padding, narrow ones little to attend to."""
        waiting = sorted(units, key=lambda nodes: (-len(nodes), int(nodes[0])))
        while waiting:
            rooms = {max(len(waiting[0]), int(share * self._budget.row_tokens)) for share in _ROOMS}
            fillings = [_filled(waiting, room, self._budget.chunk_tokens) for room in sorted(rooms)]
            rows, waiting = min(fillings, key=lambda filling: self._cost_per_token(prefix, filling[0]))
            yield Pass(prefix, tuple(np.sort(np.concatenate(row.units)) for row in rows))

    def _cost_per_token(self, prefix: int, rows: Sequence[_Row]) -> float:
        longest = max(row.used for row in rows)
        read = len(rows) * longest
        return read * (1 + self._costs.attention * (prefix + longest)) / sum(row.used for row in rows)

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


@dataclass(slots=True)
class _Row:
    """A row that is being filled. Units in it do not see each other: they meet in no ancestor but the kept prefix and
    repeated chains. Two that repeat the same chain stay apart, because a row holds a node once.

    firsts: first nodes of its units; used: its tokens."""

    units: list[Nodes]
    firsts: set[int]
    used: int

    def takes(self, unit: Nodes, room: int) -> bool:
        """Whether it has, because it could."""
        if self.used + len(unit) > room or int(unit[0]) in self.firsts:
            return False
        self.units.append(unit)
        self.firsts.add(int(unit[0]))
        self.used += len(unit)
        return True


def _filled(units: Sequence[Nodes], room: int, chunk_tokens: int) -> tuple[list[_Row], list[Nodes]]:
    """The rows of one pass by first-fit decreasing, and the units that are left. units: the longest first."""
    rows = [_Row([], set(), 0) for _ in range(max(1, chunk_tokens // room))]
    shortest, left = len(units[-1]), []
    for place, unit in enumerate(units):
        if not any(row.takes(unit, room) for row in rows):
            left.append(unit)
        if all(row.used + shortest > room for row in rows):
            left += units[place + 1 :]
            break
    return [row for row in rows if row.units], left


def _batches(rows: Sequence[Nodes], chunk_tokens: int) -> Iterator[Pass]:
    """Single inputs of like length together, the longest first, at most `chunk_tokens` with padding."""
    ordered = sorted(rows, key=lambda row: (-len(row), int(row[0])))
    start = 0
    while start < len(ordered):
        count = max(1, chunk_tokens // len(ordered[start]))
        yield Pass(0, tuple(ordered[start : start + count]), causal=True)
        start += count
