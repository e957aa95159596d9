"""Requests as one tree of tokens, flattened in depth-first order.

Sequences are sorted; each adds to the tree what it does not share with the one before it. So the flat tree is the
concatenation of these remainders, and the descendants of a node are the range that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Nodes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """What a model reads of one request, and what is asked about it.

    tokens: the input, context and all but the last token of the continuation. targets: the continuation; its tokens
    are predicted at the last `len(targets)` positions of the input.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], *, max_length: int) -> ScoredRow:
        """As lm-eval's HFLM cuts a request: the last `max_length` inputs stay.

        Raises:
            ValueError: nothing to condition on, nothing to score, or a continuation longer than the model's context.
        """
        if not context or not continuation:
            raise ValueError("a request needs a token of context and a token to score")
        if len(continuation) > max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the context of {max_length}")
        whole = (*context, *continuation)[-(max_length + 1) :]
        return cls(whole[:-1], tuple(continuation))


@dataclass(frozen=True, slots=True)
class TokenTree:
    """The distinct prefixes of all rows. Node n stands for the tokens on the way to it and for the last of them.

    tokens, depths, ends: [nodes]; the token, how many nodes lie above it (0 for a first token), and where its
    descendants end: they are the nodes n + 1 ... ends[n] - 1. paths: per distinct input, its nodes from the first on.
    path_of: per row, the index of its input in `paths`.
    """

    tokens: Nodes
    depths: Nodes
    ends: Nodes
    paths: tuple[Nodes, ...]
    path_of: tuple[int, ...]

    @property
    def size(self) -> int:
        """Nodes: the tokens to compute when each shared one is computed once."""
        return len(self.tokens)

    @property
    def flat_tokens(self) -> int:
        """Tokens to compute when only identical inputs are shared."""
        return sum(len(path) for path in self.paths)

    @property
    def depth(self) -> int:
        """Tokens of the longest input."""
        return max((len(path) for path in self.paths), default=0)

    def children(self, node: int) -> list[int]:
        """Nodes right below `node`, in order."""
        return self.siblings(node + 1, int(self.ends[node]))

    def siblings(self, first: int, end: int) -> list[int]:
        """The topmost nodes among first ... end - 1, where `first` is one and the range is closed under descent."""
        found = []
        while first < end:
            found.append(first)
            first = int(self.ends[first])
        return found

    def chain(self, node: int) -> int:
        """How many nodes, `node` included, follow each other before the tree branches or ends."""
        below = self.ends[node : self.ends[node]]
        # An only child ends where its parent does; the first node that ends earlier has branched off.
        same = below == self.ends[node]
        return len(below) if same.all() else int(np.argmin(same))


def token_tree(rows: Sequence[ScoredRow]) -> TokenTree:
    """The tree of the inputs of `rows`; it does not depend on their order."""
    inputs = sorted({row.tokens for row in rows})
    index = {tokens: place for place, tokens in enumerate(inputs)}
    tokens: list[Nodes] = []
    ends = np.zeros(sum(map(len, inputs)), dtype=np.int64)
    paths: list[Nodes] = []
    size, before, path = 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for sequence in inputs:
        now = np.array(sequence, dtype=np.int64)
        shared = _common(before, now)
        ends[path[shared:]] = size
        path = np.concatenate((path[:shared], np.arange(size, size + len(now) - shared)))
        tokens.append(now[shared:])
        paths.append(path)
        size, before = size + len(now) - shared, now
    ends[path] = size
    depths = np.zeros(size, dtype=np.int64)
    for path in paths:
        depths[path] = np.arange(len(path))
    joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int64)
    return TokenTree(joined, depths, ends[:size], tuple(paths), tuple(index[row.tokens] for row in rows))


def _common(first: Nodes, second: Nodes) -> int:
    """Length of the common beginning."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(np.argmax(differs)) if differs.any() else length
