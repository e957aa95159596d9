"""Whether torch.compile of the decoder pays: what compiling takes, what a step gains, after how many steps.

Regional, with shapes left open, so that all layers share one graph; in two ways. Whole layers: their attention depends
on the length of every row, and their adapted products on who sits where, so that each new pass is compiled anew until
torch gives up. Parts: what only the number of tokens matters to, norms and MLPs, where no adapter sits in them. The
first process finds no compiled graphs on disk, the second those of the first.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tests.benchmarks.train_rows import PARTS_COMPILED
from tests.benchmarks.train_turns import Turn


def compile_regions(network: nn.Module, how: str) -> int:
    """Compiles every layer of the decoder, or the parts of each that can be; how many regions there are."""
    layers = max((one for one in network.modules() if isinstance(one, nn.ModuleList)), key=len)
    regions = [part for layer in layers for part in _parts(layer)] if how == PARTS_COMPILED else list(layers)
    for region in regions:
        region.compile(dynamic=True)
    return len(regions)


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    """Children with no attention and no adapter in them: the trunk gives an adapted layer a forward of its own."""
    for name, part in layer.named_children():
        if "attn" not in name and not any("forward" in vars(module) for module in part.modules()):
            yield part


def bill(compiled: Sequence[Turn], eager: Sequence[Turn]) -> dict[str, Any]:
    """What the turns of both say, all of them, the first ones with the compiling included.

    compile_seconds: what the compiled side's turns took beyond its own pace of the later half. steps_until_it_pays:
    of the mean size of a turn; None where a compiled step is no faster.
    """
    later = [turn.seconds / turn.tokens for turn in compiled[len(compiled) // 2 :]]
    pace, plain = statistics.median(later), statistics.median(turn.seconds / turn.tokens for turn in eager)
    seconds = sum(turn.seconds - pace * turn.tokens for turn in compiled)
    gain = (plain - pace) * statistics.fmean(turn.tokens for turn in compiled)
    return {
        "compile_seconds": seconds,
        "tokens_per_second": {"eager": 1 / plain, "compiled": 1 / pace},
        "ratio": plain / pace,
        "gain_per_step_seconds": gain,
        "steps_until_it_pays": seconds / gain if gain > 0 else None,
    }
