"""Two engines' answers to the same requests: how far apart, and which documents' metrics differ for what reason.

A document's metric is a function of its log-likelihoods. So where these agree within the tolerance and the metric does
not, lm-eval's own value lies within the tolerance of the edge between both: a near-tie. That a continuation is what
greedy decoding gives, and the text that is generated, hang on single logits instead: there the two best logits at the
token where the engines part must be as close.

lm-eval answers requests with the same input from one row of logits, and then scores a shorter continuation at the
positions of a longer one (0.4.13, `Collator.get_cache`). So a request beyond the tolerance is scored once more by
lm-eval alone, without others to share with.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lora_lab.evaluate.guard import Allowance
from lora_lab.evaluate.lab_model import Pair
from tests.benchmarks.eval_timing import Call, EngineRun, TimedModel

Document = tuple[str, int]
_FLOAT32 = Allowance(spread=0.0, rounding=0.0, largest_logit=0.0)


@dataclass(frozen=True, slots=True)
class Difference:
    """A document one of whose metrics differs.

    log_likelihood: the largest difference of its requests, in nats; None where it generates. logit: how far the two
    engines' choices lie apart where they part; None where none of them is a choice of a token. is_near_tie: both are
    within the tolerance.
    """

    task: str
    document: int
    metric: str
    stock: float
    ours: float
    log_likelihood: float | None
    logit: float | None
    is_near_tie: bool


@dataclass(frozen=True, slots=True)
class Beyond:
    """A request whose log-likelihoods differ by more than the tolerance. alone: lm-eval's own without other requests
    beside it; None where it is a rolling one."""

    task: str
    document: int
    stock: float
    ours: float
    alone: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """largest_difference: of log-likelihoods, in nats; None without any. largest_share: of the tolerance, which grows
    with the scored tokens. other_texts: generated texts that are not the same. documents_that_differ: those with
    another metric. beyond: requests beyond the tolerance."""

    largest_difference: float | None
    largest_share: float | None
    other_texts: int | None
    documents_that_differ: Sequence[Difference]
    beyond: Sequence[Beyond]


@dataclass(frozen=True, slots=True)
class _Request:
    """One request's answers. gap: of logits where the engines choose different tokens, else None. beyond: where the
    log-likelihoods differ by more than the tolerance."""

    difference: float | None
    share: float | None
    has_other_text: bool
    gap: float | None
    beyond: Beyond | None = None


def allowed_nats(tokens: int) -> float:
    """By how much two float32 scores of so many tokens may differ."""
    return _FLOAT32.of(0.0, tokens)


def compare(stock: EngineRun, ours: EngineRun, lm: TimedModel) -> Agreement:
    """Both runs have made the same calls; `lm` computes logits where greedy choices differ."""
    requests: dict[Document, list[_Request]] = defaultdict(list)
    for theirs, own in zip(stock.calls, ours.calls, strict=True):
        for document, request in _requests(theirs, own, lm):
            requests[document].append(request)
    found = [request for of_one in requests.values() for request in of_one]
    differences = [request.difference for request in found if request.difference is not None]
    texts = any(call.kind == "generate_until" for call in ours.calls)
    return Agreement(
        largest_difference=max(differences, default=None),
        largest_share=max((request.share for request in found if request.share is not None), default=None),
        other_texts=sum(request.has_other_text for request in found) if texts else None,
        documents_that_differ=list(_differences(stock.samples, ours.samples, requests)),
        beyond=[request.beyond for request in found if request.beyond is not None],
    )


def _requests(theirs: Call, own: Call, lm: TimedModel) -> Iterator[tuple[Document, _Request]]:
    for place, (request, one, other) in enumerate(zip(own.requests, theirs.answers, own.answers, strict=True)):
        document = (str(request.task_name), int(request.doc_id))
        if own.kind == "generate_until":
            gap = None if one == other else _text_gap(lm, request.args[0], one, other)
            yield document, _Request(None, None, one != other, gap)
        elif own.kind == "loglikelihood_rolling":
            tokens = len(lm.tok_encode(request.args[0]))
            yield document, _scored(document, one, other, tokens, gap=None, alone=lambda: None)
        else:
            pair = own.pairs[place]
            gap = None if one[1] == other[1] else _greedy_gap(lm, *pair[1:])
            alone = partial(_alone, lm, pair)
            yield document, _scored(document, one[0], other[0], len(pair[2]), gap=gap, alone=alone)


def _scored(
    document: Document,
    one: float,
    other: float,
    tokens: int,
    *,
    gap: float | None,
    alone: Callable[[], float | None],
) -> _Request:
    difference = abs(one - other)
    share = difference / allowed_nats(tokens)
    return _Request(difference, share, False, gap, Beyond(*document, one, other, alone()) if share > 1 else None)


def _alone(lm: TimedModel, pair: Pair) -> float:
    """lm-eval's own log-likelihood of one request."""
    return float(HFLM._loglikelihood_tokens(lm, [pair], disable_tqdm=True)[0][0])


def _differences(
    stock: Mapping[str, Sequence[Mapping[str, Any]]],
    ours: Mapping[str, Sequence[Mapping[str, Any]]],
    requests: Mapping[Document, Sequence[_Request]],
) -> Iterator[Difference]:
    for task, samples in stock.items():
        for theirs, own in zip(samples, ours[task], strict=True):
            document = int(theirs["doc_id"])
            answers = requests[task, document]
            nats = max((one.difference for one in answers if one.difference is not None), default=None)
            logit = max((one.gap for one in answers if one.gap is not None), default=None)
            shares = [one.share for one in answers if one.share is not None]
            near = all(share <= 1 for share in shares) and (logit is None or logit <= 2 * allowed_nats(1))
            for metric in theirs["metrics"]:
                values = _number(theirs[metric]), _number(own[metric])
                if _differs(*values, moved=nats or 0.0):
                    name = metric if theirs["filter"] == "none" else f"{metric},{theirs['filter']}"
                    yield Difference(task, document, name, *values, nats, logit, near)


def _differs(one: float, other: float, *, moved: float) -> bool:
    """Whether a metric is another one. A choice jumps from 0 to 1; a share of probability follows every rounding, by
    less than the log-likelihoods moved."""
    if {one, other} <= {0.0, 1.0}:
        return one != other
    return abs(one - other) > moved + 1e-12


def _number(value: Any) -> float:
    """Of metrics that are a pair (value, weight), the value."""
    return float(value[0] if isinstance(value, Sequence) else value)


def _greedy_gap(lm: TimedModel, context: Sequence[int], continuation: Sequence[int]) -> float:
    """The least by which another token's logit would have to fall, or the target's to rise, over all targets but the
    greedy ones: how close the continuation as a whole is to being greedy or not."""
    logits = _logits(lm, [*context, *continuation][-(lm.max_length + 1) : -1])[-len(continuation) :]
    targets = torch.tensor(continuation)[:, None]
    own = logits.gather(1, targets)[:, 0]
    others = logits.scatter(1, targets, float("-inf")).amax(dim=1)
    return float((own - others).min().abs())


def _text_gap(lm: TimedModel, context: str, one: str, other: str) -> float:
    """Between the two tokens at which the texts part, after what they share."""
    prompt, ids, others = (lm.tok_encode(text) for text in (context, context + one, context + other))
    place = next(
        (place for place, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others))
    )
    if place in (len(ids), len(others)) or place < len(prompt):
        return math.inf  # one ends where the other goes on, or texts do not part at a token
    logits = _logits(lm, ids[:place])[-1]
    return float((logits[ids[place]] - logits[others[place]]).abs())


def _logits(lm: TimedModel, ids: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary] by one plain row."""
    with torch.no_grad():
        logits: torch.Tensor = lm.model(torch.tensor([list(ids)], device=lm.device)).logits[0].float().cpu()
    return logits
