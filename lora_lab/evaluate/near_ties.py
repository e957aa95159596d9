"""Multiple-choice documents whose answer could turn within the tolerance of the engine.

Two engines that agree on every log-likelihood may still choose differently where two choices are closer than that.
These documents are listed, so that a difference in accuracy can be told from a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NearTie:
    """measure: `acc` (log-likelihoods) or `acc_norm` (per character of the choice). margin: between the best two, in
    nats, or nats per character; allowed: what rounding may move it by."""

    task: str
    document: int
    measure: str
    margin: float
    allowed: float


def near_ties(results: Mapping[str, Any], allowed: Callable[[float, str], float]) -> list[NearTie]:
    """Ties in lm-eval's returned mapping (with samples), in its order.

    allowed: nats by which this score of a choice with this text may be off.
    """
    found: list[NearTie] = []
    for task, samples in results["samples"].items():
        delimiter = results["configs"].get(task, {}).get("target_delimiter") or ""
        found += _of_task(task, samples, delimiter, allowed)
    return found


def _of_task(
    task: str, samples: Sequence[Mapping[str, Any]], delimiter: str, allowed: Callable[[float, str], float]
) -> Iterator[NearTie]:
    for sample in samples:
        choices = _choices(sample, delimiter)
        for measure in ("acc", "acc_norm"):
            if len(choices) < 2 or measure not in sample:
                continue
            lengths = [max(1, len(text)) if measure == "acc_norm" else 1 for _, text in choices]
            scores = [
                (value / length, allowed(value, text) / length)
                for (value, text), length in zip(choices, lengths, strict=True)
            ]
            (best, slack), (second, other) = sorted(scores, reverse=True)[:2]
            if best - second <= slack + other:
                yield NearTie(task, int(sample["doc_id"]), measure, best - second, slack + other)


def _choices(sample: Mapping[str, Any], delimiter: str) -> list[tuple[float, str]]:
    """(log-likelihood, choice) of a document that is scored by log-likelihoods alone, else nothing."""
    responses, arguments = sample["filtered_resps"], sample["arguments"]
    if "acc_mutual_info" in sample or len(responses) != len(arguments):
        return []  # with mutual information, half of the requests are no choices
    pairs = [response for response in responses if isinstance(response, tuple) and len(response) == 2]
    if len(pairs) != len(responses):
        return []
    texts = [str(one[1]).removeprefix(delimiter) for one in arguments]
    return [(float(value), text) for (value, _), text in zip(pairs, texts, strict=True)]
