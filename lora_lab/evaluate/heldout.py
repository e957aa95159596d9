"""Loss and exact match on held-out rows: the primary metrics at pocket scale, from one forward pass per row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lora_lab.data.batches import collate
from lora_lab.data.encode import Encoded
from lora_lab.errors import EvaluationError, Problem
from lora_lab.models.loss_token_logits import LossTokenHead, loss_token_logits
from lora_lab.record.result import Metric


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One held-out row: its position in the set, sum of loss in nats, loss tokens, and whether all were the argmax."""

    index: int
    loss_nats: float
    loss_tokens: int
    exact: bool


@dataclass(frozen=True, slots=True)
class HeldoutScores:
    """`metrics` holds `heldout/loss` and `heldout/exact_match`; `missing` says why one is absent; `examples` in the
    order of the rows."""

    metrics: dict[str, Metric]
    missing: dict[str, str]
    examples: tuple[ExampleScore, ...]


def score_heldout(
    model: nn.Module, encoded: Sequence[Encoded], *, pad_id: int, batch_size: int, device: torch.device | str
) -> HeldoutScores:
    """Token-weighted loss and exact match of `model` on `encoded`.

    `heldout/loss` (nats/token): sum of the loss of all loss tokens over their number. Its standard error covers the
    rows by the ratio estimator (Cochran 1977, chapter 6): with l_i, n_i the loss and tokens of row i and
    R = sum l / sum n, se = sqrt(m / (m - 1) * sum (l_i - R n_i)^2) / sum n, for m rows; None for one row.

    `heldout/exact_match` (fraction): rows whose every loss token, the end of the turn included, is the argmax given
    the true tokens before it. With the loss on answers that is the share of rows where greedy generation gives exactly
    the answer: as long as every token was right, generation has seen the true tokens, so both stop agreeing at the
    same token, or never. Rows cut at max_length have lost their end and do not count.

    Raises:
        EvaluationError: a loss is NaN or infinite; names the row.
    """
    scores: dict[int, ExampleScore] = {}
    by_length = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index].input_ids), index))
    with scoring_mode(model), torch.inference_mode(), loss_token_logits(model) as head:
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            scores.update(_score_batch(head, encoded, indices, pad_id=pad_id, device=device))
    examples = tuple(scores[index] for index in range(len(encoded)))
    whole = [score for score in examples if not encoded[score.index].cut]
    metrics = {"heldout/loss": _loss(examples)}
    missing = {}
    if whole:
        metrics["heldout/exact_match"] = _exact_match(whole)
    else:
        missing["heldout/exact_match"] = "every held-out row was cut at max_length"
    return HeldoutScores(metrics, missing, examples)


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _score_batch(
    head: LossTokenHead, encoded: Sequence[Encoded], indices: Sequence[int], *, pad_id: int, device: torch.device | str
) -> dict[int, ExampleScore]:
    batch = collate([encoded[index] for index in indices], pad_id, device)
    logits = head(input_ids=batch.input_ids, attention_mask=batch.attention_mask, loss_mask=batch.loss_mask)
    targets = batch.input_ids[batch.loss_mask]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = nn.functional.cross_entropy(wide, targets, reduction="none")
    right = logits.argmax(-1) == targets
    counts = [encoded[index].loss_tokens for index in indices]
    rows = zip(indices, torch.split(losses, counts), torch.split(right, counts), counts, strict=True)
    return {
        index: ExampleScore(index, _finite(float(loss.sum(dtype=torch.float64)), index), count, bool(correct.all()))
        for index, loss, correct, count in rows
    }


def _finite(loss: float, index: int) -> float:
    if not math.isfinite(loss):
        raise EvaluationError(Problem(f"heldout row {index}", f"the loss is {loss}, so there is no score"))
    return loss


def _loss(examples: Sequence[ExampleScore]) -> Metric:
    tokens = sum(score.loss_tokens for score in examples)
    ratio = math.fsum(score.loss_nats for score in examples) / tokens
    count = len(examples)
    error = None
    if count > 1:
        squares = math.fsum((score.loss_nats - ratio * score.loss_tokens) ** 2 for score in examples)
        error = math.sqrt(count / (count - 1) * squares) / tokens
    return Metric(
        value=ratio, unit="nats/token", higher_is_better=False, standard_error=error, num_examples=count, chance=None
    )


def _exact_match(examples: Sequence[ExampleScore]) -> Metric:
    count = len(examples)
    share = sum(score.exact for score in examples) / count
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return Metric(
        value=share, unit="fraction", higher_is_better=True, standard_error=error, num_examples=count, chance=None
    )
