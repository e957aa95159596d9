"""The tree's log-likelihoods against lm-eval's own, on requests drawn across the tasks.

Tolerance in nats per request. In float32 and float64: 1e-4 up to 100 scored tokens, and in proportion beyond. Some
requests are worse conditioned than that: where one is beyond it, lm-eval's engine scores it again with all embeddings
moved by one rounding, and three times what that moves the score is allowed. (Of 400 BLiMP sentences through
SmolLM2-135M 8 are: one rounding moves them by 1e-4 to 1e-3, and float32 is as far from float64 there.) In other
dtypes and on quantized weights rounding alone moves scores by more: three times what lm-eval's own differ by between
batches of 1 and of 8, the most of any drawn request. Those may round alike and differ by nothing at all, so it is never
less than what rounding does by itself (`logit_rounding`): twice its share of the largest logit, growing with the root
of the scored tokens, and once its share of the score, which lm-eval sums up in the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lora_lab.errors import EvaluationError, Problem
from lora_lab.record.atomic import write_json

COUNT = 64
_TOLERANCE, _TOKENS = 1e-4, 100
_SPREADS, _ROUNDINGS, _NUDGES, _BATCHES = 3, 2, 4, (1, 8)
# Requests are drawn up to this share of all tokens: a few whole books would cost lm-eval as much as all of them.
_SHARE, _FEWEST_TOKENS = 0.1, 16_384

# Log-likelihood of each request at these indices in batches of this size (None: the evaluation's own).
Stock = Callable[[Sequence[int], int | None], Sequence[float]]
# The same with all embeddings moved by one rounding, up or down as this seed says.
Nudged = Callable[[Sequence[int], int], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Guarded:
    """One request: its task and document, texts, tokens of its input, scored tokens, and the tree's answer."""

    task: str
    document: int
    texts: tuple[str, str] | None
    tokens: int
    scored: int
    value: float


@dataclass(frozen=True, slots=True)
class Allowance:
    """What two right scores may differ by. spread: nats, of lm-eval's own between two batch sizes. rounding: relative,
    see `logit_rounding`; both 0 where all arithmetic is float32 or float64. largest_logit: that it applies to."""

    spread: float
    rounding: float
    largest_logit: float

    def of(self, score: float, scored: int) -> float:
        """In nats, for a score of this many tokens."""
        exact = _TOLERANCE * max(1.0, scored / _TOKENS)
        logits = _ROUNDINGS * self.rounding * self.largest_logit * math.sqrt(scored)
        return max(exact, _SPREADS * self.spread, logits, self.rounding * abs(score))


# Of float32 and float64 arithmetic.
EXACT = Allowance(spread=0.0, rounding=0.0, largest_logit=0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """requests: compared. largest_difference: nats. largest_share: of the tolerance, 1 at most."""

    requests: int
    largest_difference: float
    largest_share: float
    allowance: Allowance


def check_against_stock(
    requests: Sequence[Guarded], stock: Stock, nudged: Nudged, *, rounding: float | None, largest_logit: float
) -> Verdict:
    """Compares drawn requests.

    rounding: see `logit_rounding`.

    Raises:
        EvaluationError: beyond the tolerance; shows the worst request with both values.
    """
    drawn = draw([one.task for one in requests], [one.tokens for one in requests])
    if rounding is None:
        theirs, spread = stock(drawn, None), 0.0
    else:
        alone, theirs = (stock(drawn, size) for size in _BATCHES)
        spread = max((abs(one - other) for one, other in zip(alone, theirs, strict=True)), default=0.0)
    allowance = Allowance(spread, rounding or 0.0, largest_logit)
    differences = [abs(requests[index].value - value) for index, value in zip(drawn, theirs, strict=True)]
    allowed = [allowance.of(value, requests[index].scored) for index, value in zip(drawn, theirs, strict=True)]
    shares = [difference / most for difference, most in zip(differences, allowed, strict=True)]
    beyond = [place for place, share in enumerate(shares) if share > 1 and rounding is None]
    if beyond:
        moves = [nudged([drawn[place] for place in beyond], seed) for seed in range(_NUDGES)]
        for place, *moved in zip(beyond, *moves, strict=True):
            allowed[place] = max(allowed[place], _SPREADS * max(abs(value - theirs[place]) for value in moved))
            shares[place] = differences[place] / allowed[place]
    # A NaN is in no order: whatever is not within its tolerance is beyond it.
    if any(not share <= 1 for share in shares):
        worst = max(range(len(drawn)), key=lambda place: (not shares[place] <= 1, shares[place]))
        raise EvaluationError(_problem(requests[drawn[worst]], theirs[worst], allowed[worst]))
    return Verdict(len(drawn), max(differences, default=0.0), max(shares, default=0.0), allowance)


def draw(tasks: Sequence[str], tokens: Sequence[int]) -> list[int]:
    """Up to 64 indices, evenly spread over each task and in turn from all tasks; the same for the same requests."""
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        by_task.setdefault(task, []).append(index)
    turns = zip_longest(*(_spread(indices) for indices in by_task.values()))
    room = max(_FEWEST_TOKENS, _SHARE * sum(tokens))
    drawn: list[int] = []
    for index in (one for turn in turns for one in turn if one is not None):
        if len(drawn) == COUNT:
            break
        if not drawn or tokens[index] <= room:
            drawn.append(index)
            room -= tokens[index]
    return sorted(drawn)


def read_verdict(path: Path) -> Verdict | None:
    """The verdict kept in a file, or None where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["verdict"]
        return Verdict(**{**values, "allowance": Allowance(**values["allowance"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_verdict(path: Path, verdict: Verdict, facts: Mapping[str, Any]) -> None:
    """Keeps a verdict; `facts` say what it is about."""
    write_json(path, {"about": dict(facts), "verdict": asdict(verdict)})


def _spread(indices: Sequence[int]) -> list[int]:
    count = min(COUNT, len(indices))
    return [indices[place * len(indices) // count] for place in range(count)]


def _problem(request: Guarded, theirs: float, allowed: float) -> Problem:
    text = ""
    if request.texts is not None:
        context, continuation = request.texts
        text = f"; request: {context[-200:]!r} -> {continuation[:200]!r}"
    return Problem(
        f"task {request.task}, document {request.document}",
        f"the tree gives a log-likelihood of {request.value:.6f}, lm-eval's own engine {theirs:.6f}: they differ by "
        f"{abs(request.value - theirs):.2g}, allowed is {allowed:.2g}; use evaluation.engine=stock, and "
        f"report it{text}",
    )
