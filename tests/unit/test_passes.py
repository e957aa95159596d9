"""Plans of passes: replayed as the forward pass runs them, every node finds its ancestors where they should be."""

from __future__ import annotations

from random import Random
from time import process_time

import numpy as np
import pytest

from lora_lab.evaluate.tree.passes import FLAT_FROM, Budget, Costs, Pass, plan_passes
from lora_lab.evaluate.tree.token_tree import ScoredRow, TokenTree, token_tree
from tests.tree_families import random_rows

BUDGETS = [Budget(1, 1), Budget(8, 8), Budget(64, 16), Budget(16, 64), Budget(512, 128), Budget(10**6, 10**6)]
COSTS = [Costs(0.0, 0.0), Costs(1e-4, 30.0), Costs(1.0, 0.0), Costs(0.0, 1e6), Costs(1.0, 1e6)]


def rows_of(*inputs: tuple[int, ...]) -> list[ScoredRow]:
    return [ScoredRow(one, (0,)) for one in inputs]


def replay(tree: TokenTree, passes: list[Pass], budget: Budget) -> None:
    """Runs the stack of kept nodes as the prefix cache does: cut to the pass's prefix, then extended by `keep`.

    Each row must hold each node once, in order, at the place behind prefix and row ancestors that its depth says.
    """
    parent = np.full(tree.size, -1)
    for path in tree.paths:
        parent[path[1:]] = path[:-1]
    kept: list[int] = []
    computed: set[int] = set()
    for one in passes:
        assert 0 <= one.prefix <= len(kept), "a prefix that was never kept"
        kept = kept[: one.prefix]
        assert len(one.rows) == 1 or not one.keep
        padded = len(one.rows) * max(map(len, one.rows))
        assert padded <= budget.chunk_tokens or len(one.rows) == 1
        for row in one.rows:
            nodes = row.tolist()
            assert nodes and nodes == sorted(set(nodes))
            seen = {*kept, *nodes}
            for node in nodes:
                ancestors = [other for other in seen if other < node < tree.ends[other]]
                assert len(ancestors) == tree.depths[node], "all ancestors, by the mask, and no other node"
            foreign = [node for node in kept if not all(node < other < tree.ends[node] for other in nodes)]
            assert not foreign, "all rows see the whole prefix, so it must be above all of them"
            if one.causal:
                assert not kept and parent[nodes].tolist() == [-1, *nodes[:-1]]
            if one.keep:
                assert parent[nodes].tolist() == [kept[-1] if kept else -1, *nodes[:-1]]
            computed.update(nodes)
        if one.keep:
            kept += one.rows[0].tolist()
    assert computed == set(range(tree.size))


def listed(passes: list[Pass]) -> list[tuple[int, list[list[int]], bool, bool]]:
    return [(one.prefix, [row.tolist() for row in one.rows], one.keep, one.causal) for one in passes]


@pytest.mark.parametrize("costs", COSTS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_node_with_its_ancestors(budget: Budget, costs: Costs) -> None:
    for seed in range(4):
        for branching in (0.2, 0.5):
            rows = random_rows(seed, 30, longest=20, letters=4, branching=branching)
            tree = token_tree(rows)
            passes = plan_passes(tree, budget, costs)
            replay(tree, passes, budget)
            shuffled = list(rows)
            Random(seed).shuffle(shuffled)
            assert listed(plan_passes(token_tree(shuffled), budget, costs)) == listed(passes)


def long_header() -> list[ScoredRow]:
    """A header of 90 tokens, then 40 questions of 10 with four answers of 3 each."""
    random = Random(0)
    header = tuple(random.randrange(99) for _ in range(90))
    rows = []
    for _ in range(40):
        question = tuple(random.randrange(99) for _ in range(10))
        rows += [(*header, *question, *(random.randrange(99) for _ in range(3))) for _ in range(4)]
    return rows_of(*rows)


HOSTILE = {
    "one": rows_of((1, 2, 3)),
    "one token": rows_of((1,)),
    "all identical": rows_of(*[(1, 2, 3, 4)] * 50),
    "nothing shared": rows_of(*[(first, *range(5)) for first in range(50)]),
    "a prefix of another": rows_of((1, 2), (1, 2, 3, 4), (1,), (1, 2, 3, 4, 5, 6)),
    "chains beyond every budget": rows_of(*[(*range(700), end) for end in range(700, 706)]),
    "a long header": long_header(),
    "last tokens only": rows_of(*[(7, end) for end in range(200)]),
}


@pytest.mark.parametrize("costs", COSTS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sets(name: str, budget: Budget, costs: Costs) -> None:
    tree = token_tree(HOSTILE[name])
    replay(tree, plan_passes(tree, budget, costs), budget)


def test_an_empty_tree() -> None:
    assert plan_passes(token_tree([]), Budget(8, 8), Costs(0.0, 0.0)) == []


def test_all_three_ways_past_a_chain() -> None:
    """Each is chosen where the module's formulas make it the cheapest, and the plan looks like it."""
    tree = token_tree(long_header())
    dear_passes = plan_passes(tree, Budget(10**6, 64), Costs(0.0, 1e9))
    assert [len(one.rows) for one in dear_passes] == [1] and not dear_passes[0].keep, "whole"
    dear_pairs = plan_passes(tree, Budget(512, 256), Costs(1.0, 0.0))
    assert dear_pairs[0].keep and dear_pairs[0].tokens == 90, "kept"
    assert sum(one.tokens for one in dear_pairs) == tree.size
    dear_both = plan_passes(tree, Budget(512, 512), Costs(0.0, 1e9))
    assert not any(one.keep for one in dear_both), "repeated"
    rows = sum(len(one.rows) for one in dear_both)
    assert rows > 1 and sum(one.tokens for one in dear_both) == tree.size + (rows - 1) * 90
    for passes, budget in ((dear_passes, 10**6), (dear_pairs, 512), (dear_both, 512)):
        replay(tree, passes, Budget(budget, budget))


def test_flat_where_little_is_shared() -> None:
    """Single inputs, longest first, without a mask."""
    rows = rows_of(*[(1, *[first] * (5 + first % 7)) for first in range(2, 40)])
    tree = token_tree(rows)
    assert tree.size >= FLAT_FROM * tree.flat_tokens
    passes = plan_passes(tree, Budget(64, 64), Costs(0.0, 0.0))
    assert all(one.causal and not one.keep and not one.prefix for one in passes)
    lengths = [len(row) for one in passes for row in one.rows]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(lengths) == sorted(len(row.tokens) for row in rows)
    replay(tree, passes, Budget(64, 64))


@pytest.mark.parametrize("costs", COSTS, ids=str)
@pytest.mark.parametrize("budget", [Budget(1, 1), Budget(512, 128), Budget(10**6, 10**6)], ids=str)
def test_a_caterpillar(budget: Budget, costs: Costs) -> None:
    """2,500 tokens deep with a leaf at each: no recursion, and every node computed."""
    line = tuple(range(1, 2501))
    tree = token_tree(rows_of(*[(*line[:end], 0) for end in range(1, 2501)]))
    passes = plan_passes(tree, budget, costs)
    computed = np.concatenate([row for one in passes for row in one.rows])
    assert np.array_equal(np.unique(computed), np.arange(tree.size))


def test_planning_grows_with_the_requests_and_not_faster() -> None:
    """Of 10,000 requests at most eight times what a quarter of them takes; a quadratic plan would take sixteen."""

    def seconds(requests: int) -> float:
        random = Random(1)
        headers = [tuple(random.randrange(999) for _ in range(30)) for _ in range(requests // 50)]
        inputs = [(*random.choice(headers), *(random.randrange(999) for _ in range(12))) for _ in range(requests)]
        start = process_time()
        plan_passes(token_tree(rows_of(*inputs)), Budget(2048, 512), Costs(1e-4, 50.0))
        return process_time() - start

    seconds(500)
    assert seconds(10_000) < 8 * min(seconds(2500) for _ in range(3))
