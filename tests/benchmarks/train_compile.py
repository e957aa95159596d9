"""Whether torch.compile of the decoder layers pays: what compiling takes, what a step gains, after how many steps.

Regional: each decoder layer is compiled by itself, with shapes left open, so that all layers share one graph. The first
process finds no compiled graphs on disk, the second those of the first.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.train_turns import Turn


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
