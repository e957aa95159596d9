"""Log-likelihoods of requests from the passes of a token tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.evaluate.tree.forward import tree_forward
from lora_lab.evaluate.tree.passes import Budget, Costs, Pass, plan_passes
from lora_lab.evaluate.tree.token_tree import Nodes, ScoredRow, TokenTree, token_tree

# Logits that are normalised at once: few enough to stay near the processor for a vocabulary of 50,000.
_SLICE = 64

Answer = tuple[float, bool]
# Told after each pass how many tokens have been read, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TreeCounts:
    """requests, distinct: asked, and different in input or targets. flat_tokens: inputs of all requests; nodes: of the
    tree; computed_tokens: read by the model, with repeated prefixes, without padding; padded_tokens: with it."""

    requests: int
    distinct: int
    flat_tokens: int
    nodes: int
    passes: int
    computed_tokens: int
    padded_tokens: int
    longest: int
    is_flat: bool


@dataclass(frozen=True, slots=True)
class PlanScores:
    """answers: (log-likelihood in nats, whether each target is the argmax) per row of the plan. largest_logit: of all
    that were looked at, without its sign."""

    answers: tuple[Answer, ...]
    largest_logit: float


@dataclass(frozen=True, slots=True)
class TreePlan:
    """The tree of a set of requests and how it is computed; made without a model."""

    rows: tuple[ScoredRow, ...]
    tree: TokenTree
    passes: tuple[Pass, ...]

    @property
    def counts(self) -> TreeCounts:
        """What the plan costs beside what lm-eval's pairs would."""
        return TreeCounts(
            requests=len(self.rows),
            distinct=len(set(self.rows)),
            flat_tokens=sum(len(row.tokens) for row in self.rows),
            nodes=self.tree.size,
            passes=len(self.passes),
            computed_tokens=sum(one.tokens for one in self.passes),
            padded_tokens=sum(len(one.rows) * max(map(len, one.rows)) for one in self.passes),
            longest=self.tree.depth,
            is_flat=all(one.causal and not one.keep for one in self.passes),
        )


def plan_rows(rows: Sequence[ScoredRow], budget: Budget, costs: Costs) -> TreePlan:
    """The plan of these requests; the same requests in another order have the same passes."""
    tree = token_tree(rows)
    return TreePlan(tuple(rows), tree, tuple(plan_passes(tree, budget, costs)))


def score_plan(
    model: nn.Module,
    plan: TreePlan,
    *,
    softmax_dtype: torch.dtype | None = None,
    autocast: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - it has no state
    progress: Progress = lambda _read, _total: None,
) -> PlanScores:
    """The scores of a plan's rows, in their order.

    Log-probabilities are normalised and summed in the dtype of the logits, or in `softmax_dtype`, as lm-eval does it.

    Args:
        model: in evaluation mode; a causal LM of transformers, or a PeftModel around one.
        softmax_dtype: HFLM's setting.
        autocast: a context for forward passes; logits are normalised outside it, as in HFLM.
        progress: told after each pass.
    """
    if not plan.rows:
        return PlanScores((), 0.0)
    asked = _Asked.of(plan)
    read, total, largest = 0, sum(one.tokens for one in plan.passes), 0.0
    values: list[Tensor] = []
    order: list[Nodes] = []
    greedy = np.full(plan.tree.size, -1, dtype=np.int64)
    open_nodes = np.zeros(plan.tree.size, dtype=bool)
    open_nodes[asked.nodes] = True
    with tree_forward(model, plan.tree) as forward:
        for one in plan.passes:
            read += one.tokens
            found = np.unique(np.concatenate(one.rows))
            wanted = found[open_nodes[found]]
            open_nodes[wanted] = False
            if not len(wanted) and not one.keep:
                continue
            with autocast:
                logits, nodes = forward(one, wanted)
            pairs, row_of = asked.pairs_of(nodes)
            largest = max(largest, _largest(logits))
            scores, best = _normalised(logits, row_of, asked.targets[pairs], softmax_dtype)
            values.append(scores)
            order.append(pairs)
            greedy[nodes] = best
            progress(read, total)
    return PlanScores(_answers(plan, asked, torch.cat(values), np.concatenate(order), greedy), largest)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The distinct (node, target) pairs, sorted by node, and per row the pairs of its targets."""

    nodes: Nodes
    targets: Nodes
    of_row: tuple[Nodes, ...]

    @classmethod
    def of(cls, plan: TreePlan) -> _Asked:
        lengths = [len(row.targets) for row in plan.rows]
        nodes = np.concatenate(
            [plan.tree.paths[path][-count:] for path, count in zip(plan.tree.path_of, lengths, strict=True)]
        )
        targets = np.concatenate([np.array(row.targets, dtype=np.int64) for row in plan.rows])
        pairs, index = np.unique(np.stack((nodes, targets)), axis=1, return_inverse=True)
        return cls(pairs[0], pairs[1], tuple(np.split(index.reshape(-1), np.cumsum(lengths)[:-1])))

    def pairs_of(self, nodes: Nodes) -> tuple[Nodes, Nodes]:
        """Indices of all pairs of these nodes, in their order, and where in `nodes` the node of each stands."""
        starts, ends = (np.searchsorted(self.nodes, nodes, side=side) for side in ("left", "right"))
        counts = ends - starts
        before = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
        row_of = np.repeat(np.arange(len(nodes)), counts)
        return np.arange(before[-1]) + (starts - before[:-1])[row_of], row_of


def _normalised(
    logits: Tensor, row_of: Nodes, targets: Nodes, softmax_dtype: torch.dtype | None
) -> tuple[Tensor, Nodes]:
    """Log-probability of each target in its row of `logits`, on the CPU, and the argmax of each row.

    row_of: ascending.
    """
    rows, columns = (torch.from_numpy(values).to(logits.device) for values in (row_of, targets))
    scores = [logits.new_empty(0, dtype=softmax_dtype)]
    best = [rows.new_empty(0)]
    for start in range(0, len(logits), _SLICE):
        normal = torch.log_softmax(logits[start : start + _SLICE], dim=-1, dtype=softmax_dtype)
        inside = slice(*np.searchsorted(row_of, (start, start + _SLICE)).tolist())
        scores.append(normal[rows[inside] - start, columns[inside]])
        best.append(normal.argmax(dim=-1))
    return torch.cat(scores).cpu(), torch.cat(best).cpu().numpy()


def _answers(plan: TreePlan, asked: _Asked, values: Tensor, order: Nodes, greedy: Nodes) -> tuple[Answer, ...]:
    by_pair = torch.empty_like(values)
    by_pair[torch.from_numpy(order)] = values
    right = greedy[asked.nodes] == asked.targets
    answers = {}
    for row, pairs in zip(plan.rows, asked.of_row, strict=True):
        if row not in answers:
            answers[row] = (float(by_pair[torch.from_numpy(pairs)].sum()), bool(right[pairs].all()))
    return tuple(answers[row] for row in plan.rows)


def _largest(logits: Tensor) -> float:
    """Without its sign; 0 where there are none."""
    if not logits.numel():
        return 0.0
    least, most = logits.aminmax()
    return max(abs(float(least)), abs(float(most)))
