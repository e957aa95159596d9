"""Trees of tokens against what they stand for: sets of prefixes, counted one by one."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from lora_lab.evaluate.tree.token_tree import ScoredRow, TokenTree, token_tree
from tests.tree_families import random_rows


def inputs_of(*texts: str) -> list[ScoredRow]:
    """One letter, one token; the target is nobody's matter here."""
    return [ScoredRow(tuple(map(ord, text)), (0,)) for text in texts]


def prefixes(rows: list[ScoredRow]) -> set[tuple[int, ...]]:
    return {row.tokens[: end + 1] for row in rows for end in range(len(row.tokens))}


def spelled(tree: TokenTree) -> list[tuple[int, ...]]:
    """By walking down from each first token with a stack of open nodes: what each node stands for."""
    found: list[tuple[int, ...]] = []
    for node in range(tree.size):
        above = [other for other in range(node + 1) if other <= node < tree.ends[other]]
        found.append(tuple(int(tree.tokens[one]) for one in above))
    return found


SHAPES = {
    "few letters": {"letters": 2, "longest": 8},
    "deep": {"letters": 3, "longest": 30, "branching": 0.5},
    "nothing shared": {"letters": 100_000, "longest": 6, "branching": 2.0},
    "prefixes of each other": {"letters": 50, "longest": 12, "branching": 0.9},
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", SHAPES)
def test_nodes_are_the_distinct_prefixes(shape: str, seed: int) -> None:
    rows = random_rows(seed, 40, **SHAPES[shape])  # type: ignore[arg-type]
    tree = token_tree(rows)
    words = spelled(tree)
    assert len(words) == len(set(words)) == tree.size
    assert set(words) == prefixes(rows)
    assert [len(word) - 1 for word in words] == tree.depths.tolist()
    for row, place in zip(rows, tree.path_of, strict=True):
        path = tree.paths[place]
        assert tuple(tree.tokens[path].tolist()) == row.tokens
        assert words[path[-1]] == row.tokens
        assert path.tolist() == sorted(path.tolist())
    distinct = {row.tokens for row in rows}
    assert len(tree.paths) == len(distinct)
    assert tree.flat_tokens == sum(map(len, distinct))
    assert tree.depth == max(map(len, distinct))


@pytest.mark.parametrize("seed", range(5))
def test_children_chains_and_order(seed: int) -> None:
    rows = random_rows(seed, 30, longest=10, letters=3)
    tree = token_tree(rows)
    words = spelled(tree)
    for node, word in enumerate(words):
        below = [index for index, other in enumerate(words) if len(other) == len(word) + 1 and other[:-1] == word]
        assert tree.children(node) == below
        assert tree.ends[node] == 1 + max(index for index, other in enumerate(words) if other[: len(word)] == word)
        length, last = 1, node
        while len(tree.children(last)) == 1:
            length, last = length + 1, tree.children(last)[0]
        assert tree.chain(node) == length
    assert tree.siblings(0, tree.size) == [index for index, word in enumerate(words) if len(word) == 1]
    shuffled = list(rows)
    Random(seed).shuffle(shuffled)
    again = token_tree(shuffled)
    assert np.array_equal(again.tokens, tree.tokens) and np.array_equal(again.ends, tree.ends)
    assert dict(zip(shuffled, again.path_of, strict=True)) == dict(zip(rows, tree.path_of, strict=True))


def test_by_hand() -> None:
    tree = token_tree(inputs_of("cab", "a", "ab", "cab", "cad"))
    assert bytes(tree.tokens.tolist()) == b"abcabd"
    assert tree.depths.tolist() == [0, 1, 0, 1, 2, 2]
    assert tree.ends.tolist() == [2, 2, 6, 6, 5, 6]
    assert [path.tolist() for path in tree.paths] == [[0], [0, 1], [2, 3, 4], [2, 3, 5]]
    assert tree.path_of == (2, 0, 1, 2, 3)


def test_an_empty_set() -> None:
    tree = token_tree([])
    assert (tree.size, tree.depth, tree.flat_tokens, tree.paths, tree.path_of) == (0, 0, 0, (), ())


def test_a_caterpillar() -> None:
    """Every prefix of a long line has a leaf of its own: nothing recurses over its depth."""
    deep = 2500
    line = tuple(range(1, deep + 1))
    rows = [ScoredRow((*line[:end], 0), (0,)) for end in range(1, deep + 1)]
    tree = token_tree(rows)
    assert tree.size == 2 * deep
    assert tree.depth == deep + 1
    for place, row in zip(tree.path_of, rows, strict=True):
        assert len(tree.paths[place]) == len(row.tokens)


def test_what_of_a_request_the_model_reads() -> None:
    """lm-eval: the last max_length + 1 tokens of the pair, of which the last is only predicted."""
    assert ScoredRow.of([1, 2, 3], [4, 5], max_length=9) == ScoredRow((1, 2, 3, 4), (4, 5))
    assert ScoredRow.of([1, 2, 3], [4, 5], max_length=2) == ScoredRow((3, 4), (4, 5))
    for context, continuation, room in (([], [1], 9), ([1], [], 9), ([1], [2, 3, 4], 2)):
        with pytest.raises(ValueError, match="token"):
            ScoredRow.of(context, continuation, max_length=room)
