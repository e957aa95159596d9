"""What training an adapter costs at least: the frozen matrix products, as a count and as a measured time.

Counted: 2 operations per weight and token forward, 2 more backward, through every linear layer but the projections of
the first layer that read the (frozen) embeddings, whose inputs need no gradient; the output embedding for tokens that
carry loss alone. The adapters' own products (under 4 % at rank 8), attention, norms and the optimizer are left out, so
that both limits lie a little above what any program can reach.

Two limits come of it: the count at the speed of one large product, and the same products at the model's own shapes and
number of rows, which small batches do not use a machine as well with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.data.encode import Encoded

_READ_EMBEDDINGS = ("q_proj", "k_proj", "v_proj")
# A measurement is repeated until it has taken so long, but not for ever.
_ENOUGH_SECONDS = 2.0
_MOST_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Product:
    """A frozen matrix [out, in] that tokens go through. backward: its input needs a gradient. head: of loss tokens."""

    weight: Tensor
    backward: bool
    head: bool


@dataclass(frozen=True, slots=True)
class Shapes:
    """Limits in real tokens per second at so many rows of the products; gflops: the speed that this is."""

    rows: int
    loss_rows: int
    tokens_per_second: float
    gflops: float


def products(network: nn.Module) -> list[Product]:
    """The frozen products of a plain model of the Llama family, the head last."""
    head: Any = network.get_output_embeddings()  # type: ignore[operator]
    return [*_layers(network, head), Product(head.weight, backward=True, head=True)]


def _layers(network: nn.Module, head: nn.Module) -> Iterator[Product]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            first = ".layers.0." in f".{name}" and name.rpartition(".")[2] in _READ_EMBEDDINGS
            yield Product(module.weight, backward=not first, head=False)


def operations(found: Sequence[Product], *, tokens: float, loss_tokens: float) -> float:
    """Multiplications and additions of a forward and a backward pass."""
    return sum(
        2 * product.weight.numel() * (1 + product.backward) * (loss_tokens if product.head else tokens)
        for product in found
    )


def mean_tokens(rows: Sequence[Encoded]) -> tuple[float, float]:
    """Of a row: tokens, and tokens that carry loss."""
    return (
        statistics.fmean(len(row.input_ids) for row in rows),
        statistics.fmean(row.loss_tokens for row in rows),
    )


def large_product_limit(found: Sequence[Product], *, tokens: float, loss_tokens: float, gflops: float) -> float:
    """Real tokens per second at the speed of one large product."""
    return tokens / (operations(found, tokens=tokens, loss_tokens=loss_tokens) / (gflops * 1e9))


def own_shapes_limit(
    found: Sequence[Product], *, rows: int, loss_rows: int, clock: Callable[[], float] = time.perf_counter
) -> Shapes:
    """Real tokens per second if there were nothing but these products, measured: each weight once forward and once
    backward, as a step reads them, with activations of `rows` tokens (`loss_rows` for the head)."""
    sizes = {(size, product.head) for product in found for size in product.weight.shape}
    inputs = {(size, head): torch.randn(loss_rows if head else rows, size) for size, head in sizes}
    seconds: list[float] = []
    with torch.no_grad():
        while sum(seconds) < _ENOUGH_SECONDS and len(seconds) < _MOST_REPEATS:
            begin = clock()
            _pass(found, inputs)
            seconds.append(clock() - begin)
    best = min(seconds)
    work = operations(found, tokens=rows, loss_tokens=loss_rows)
    return Shapes(rows, loss_rows, rows / best, work / best / 1e9)


def _pass(found: Sequence[Product], inputs: dict[tuple[int, bool], Tensor]) -> None:
    for product in found:
        torch.mm(inputs[product.weight.shape[1], product.head], product.weight.t())
    for product in reversed(found):
        if product.backward:
            torch.mm(inputs[product.weight.shape[0], product.head], product.weight)
