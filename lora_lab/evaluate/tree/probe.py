"""The numeric probe of `support`: a small tree through a model against each of its sequences alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.evaluate.heldout import scoring_mode
from lora_lab.evaluate.tree.forward import TreeForward, tree_forward
from lora_lab.evaluate.tree.passes import Pass
from lora_lab.evaluate.tree.rounding import logit_rounding
from lora_lab.evaluate.tree.token_tree import Nodes, ScoredRow, TokenTree, token_tree

# Tokens of the longest sequence: long enough for stems and branches that tell positions apart; and at the very least.
LONGEST, SHORTEST = 24, 8
# Of a log-probability in float32 or float64, as large as that of chance or smaller.
TOLERANCE = 1e-4
# Lower precision and quantized weights: by how much more than batching the tree may change a log-probability.
_TIMES_OWN = 3
_SEED = 0
# What forward passes raise where they cannot do what is asked; anything else is not about trees.
_FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    ImportError,
)
_NO_MEMORY = ("out of memory", "can't allocate memory")

# (differences of log-probabilities, the log-probabilities of single rows) -> whether they are too large.
_Exceeds = Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True, slots=True)
class _Alone:
    """A sequence by itself. values: log-probability of each row's target, [tokens]; largest: of the logits in it."""

    values: Tensor
    largest: float


def why_probe_fails(model: nn.Module, *, length: int) -> str | None:
    """Why a tree of sequences of up to `length` tokens gives other log-probabilities than they have alone, or None.

    Every way to compute a node is taken: a kept prefix that is extended, cut back and read by padded rows of packed
    branches, and rows that repeat their stem without one. All log-probabilities of next tokens are compared.

    float32, float64: each within TOLERANCE; where a log-probability is larger than that of chance, ln V, within
    TOLERANCE times that multiple, because a logit's rounding error grows with it.
    Lower precision (reduced float32 products included) and quantized weights: the root mean square of a row's
    differences in a pass is within three times the largest of those between each row alone and in one padded batch.
    These may round alike, as they do for small matrices, so it may also reach what rounding does by itself
    (`logit_rounding`). Valid trees stayed at or below about half of this (24 tiny architectures in bf16 and fp16,
    SmolLM2-135M in bf16 and nf4); places in a row taken for positions made twice this on SmolLM2. int8's noise may hide
    such a mistake.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: there is no memory for it.
    """
    with scoring_mode(model), torch.no_grad(), _unheard_routers(model), _own_randomness(model):
        try:
            return _mismatch(model, _rows(_tokens(model), length))
        except _FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY):
                raise
            return f"the probe's forward pass raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _mismatch(model: Any, rows: Sequence[ScoredRow]) -> str | None:
    alone = [_alone(model, row) for row in rows]
    rounding = logit_rounding(model)
    exceeds = _beyond_rounding(model) if rounding is None else _beyond_batching(model, rows, alone, rounding)
    tree = token_tree(rows)
    worst, is_wrong = 0.0, False
    with tree_forward(model, tree) as forward:
        for one in _passes(tree):
            for index, places, values in _of_pass(forward, one, tree, rows):
                expected = alone[index].values[places]
                difference = _difference(values, expected)
                worst = max(worst, float(difference.max()))
                is_wrong = is_wrong or exceeds(difference, expected)
    return (
        f"in a probe its log-probabilities differ by up to {worst:.2g} from those of single rows" if is_wrong else None
    )


def _beyond_rounding(model: Any) -> _Exceeds:
    chance = math.log(_vocabulary(model))
    return lambda difference, expected: bool((difference > TOLERANCE * (expected.abs() / chance).clamp(min=1)).any())


def _beyond_batching(model: Any, rows: Sequence[ScoredRow], alone: Sequence[_Alone], rounding: float) -> _Exceeds:
    pairs = zip(_batched(model, rows), alone, strict=True)
    own = max(_root_mean_square(_difference(values, one.values)) for values, one in pairs)
    allowed = max(_TIMES_OWN * own, rounding * max(one.largest for one in alone), TOLERANCE)
    return lambda difference, _expected: _root_mean_square(difference) > allowed


def _rows(tokens: Sequence[int], length: int) -> list[ScoredRow]:
    """Two stems, one below the other, and branches of unequal lengths below both; `length` tokens at most.

    Each row is scored at every position: its targets are its tokens from the second on and one more.
    """
    supply = iter(tokens)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(supply) for _ in range(count))

    quarter = length // 4
    upper, lower = take(quarter), take(quarter)
    rest = length - 2 * quarter
    longest = take(rest)
    branches = (longest, longest[: rest // 2] + take(rest // 4), take(rest * 2 // 3), take(rest // 2))
    inputs = [*(upper + lower + branch for branch in branches), upper + take(length - quarter - 1)]
    return [ScoredRow(one, (*one[1:], *take(1))) for one in inputs]


def _passes(tree: TokenTree) -> list[Pass]:
    """Of the tree of `_rows`: first below kept stems, then with the stems in each row."""
    first, fork, second, short, other = (tree.paths[path] for path in tree.path_of)
    upper = len(first) // 4
    stems = 2 * upper
    packed = np.unique(np.concatenate((first, fork, second)))
    return [
        Pass(0, (first[:upper],), keep=True, causal=True),
        Pass(upper, (first[upper:stems],), keep=True),
        Pass(stems, (np.setdiff1d(packed, first[:stems]), short[stems:])),
        Pass(upper, (other[upper:],)),
        Pass(0, (packed, other)),
    ]


def _of_pass(
    forward: TreeForward, one: Pass, tree: TokenTree, rows: Sequence[ScoredRow]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, its positions that the pass computes, log-probabilities of their targets), on the CPU."""
    wanted: Nodes = np.unique(np.concatenate(one.rows))
    logits, nodes = forward(one, wanted)
    logits = logits[torch.from_numpy(np.argsort(nodes)).to(logits.device)]
    for index, row in enumerate(rows):
        path = tree.paths[tree.path_of[index]]
        places = np.flatnonzero(np.isin(path, wanted))
        if len(places):
            found = torch.from_numpy(np.searchsorted(wanted, path[places])).to(logits.device)
            targets = [row.targets[place] for place in places]
            yield index, torch.from_numpy(places), _log_probabilities(logits[found], targets)


def _alone(model: Any, row: ScoredRow) -> _Alone:
    # Called as lm-eval does: ids, and no mask. Logits of virtual tokens come first.
    logits = model(torch.tensor([row.tokens], device=model.device)).logits[0, -len(row.tokens) :]
    scored = logits.gather(-1, torch.tensor(row.targets, device=logits.device)[:, None])
    largest = float(torch.maximum(scored[:, 0].abs(), logits.amax(-1).abs()).max())
    return _Alone(_log_probabilities(logits, row.targets), largest)


def _batched(model: Any, rows: Sequence[ScoredRow]) -> list[Tensor]:
    """As `_alone`, all rows in one call, padded behind as lm-eval does it."""
    longest = max(len(row.tokens) for row in rows)
    padded = [(*row.tokens, *[0] * (longest - len(row.tokens))) for row in rows]
    logits = model(torch.tensor(padded, device=model.device)).logits[:, -longest:]
    return [_log_probabilities(one[: len(row.tokens)], row.targets) for one, row in zip(logits, rows, strict=True)]


def _log_probabilities(logits: Tensor, targets: Sequence[int]) -> Tensor:
    """[tokens] on the CPU, of one target per row of logits [tokens, vocabulary]."""
    logs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logs.gather(-1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].cpu()


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """|first - second|; 0 where both are the same infinity or not a number, infinite where one is."""
    same = (first == second) | (first.isnan() & second.isnan())
    return (first - second).abs().nan_to_num(nan=math.inf).masked_fill(same, 0)


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _tokens(model: Any) -> list[int]:
    """Ids of the model's vocabulary in an order of chance that is always the same, none of them special."""
    special = {value for section in (model.config, model.generation_config) for value in _special_ids(section)}
    ids = np.setdiff1d(np.arange(_vocabulary(model)), sorted(special))
    random = np.random.default_rng(_SEED)
    # Ids come again only where the vocabulary is smaller than the probe.
    return [int(one) for _ in range(math.ceil(100 / len(ids))) for one in random.permutation(ids)[:100]]


def _special_ids(section: Any) -> Iterator[int]:
    """Numbers under keys that name a token, in a configuration or one inside it."""
    for name, value in vars(section).items():
        if hasattr(value, "to_dict"):
            yield from _special_ids(value)
        elif name.endswith(("_token_id", "_token_index", "_token_ids")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


@contextmanager
def _unheard_routers(model: nn.Module) -> Iterator[None]:
    """Routing logs hear nothing within the block."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "routing_log", None) is not None]
    logs = [layer.routing_log for layer in layers]
    for layer in layers:
        layer.routing_log = None
    try:
        yield
    finally:
        for layer, log in zip(layers, logs, strict=True):
            layer.routing_log = log


@contextmanager
def _own_randomness(model: Any) -> Iterator[None]:
    """No draw within the block moves torch's global generators."""
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
