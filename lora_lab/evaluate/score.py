"""All scores of a model: held-out rows first, then lm-eval's tasks; of a mixture what its routers did on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_lab.data.encode import Encoded
from lora_lab.data.rows import Row
from lora_lab.evaluate.answers import write_answers
from lora_lab.evaluate.guard_note import guard_note
from lora_lab.evaluate.harness import Scores, evaluate_model
from lora_lab.evaluate.heldout import HeldoutScores, score_heldout
from lora_lab.evaluate.routing import routing_summary, write_routing
from lora_lab.evaluate.tree.scores import Progress
from lora_lab.record.run_record import HELDOUT_FILE
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.method import ROUTED_KINDS
from lora_lab.schema.trial import Trial


def score_model(
    model: Any,
    tokenizer: Any,
    heldout: Sequence[Encoded],
    rows: Sequence[Row],
    trial: Trial,
    *,
    cache: Path,
    output: Path,
    progress: Progress,
) -> Scores:
    """Scores `model` where it is; per-example files and sample answers go to `output`.

    heldout, rows: the held-out rows, as tokens and as text. progress: see `evaluate_model`.

    Raises:
        EvaluationError: a score is not finite, or lm-eval refuses.
    """
    evaluation = trial.evaluation
    scores = evaluate_model(
        model,
        tokenizer,
        evaluation,
        cache=cache,
        output=output,
        guard_note=guard_note(trial, device=model.device.type, cache=cache),
        progress=progress,
        remember=trial.method.kind == "base",  # whose scores every sweep asks for again
    )
    tasks = tuple(scores.facts.get("task_hashes", ()))
    why = write_answers(model, tokenizer, rows, evaluation.answers, template=trial.data.template, output=output)
    if why is not None:
        scores = replace(scores, missing=scores.missing | {"answers": why})
    if evaluation.heldout:
        own = _score_heldout(model, tokenizer, heldout, evaluation)
        _write_heldout(own, heldout, output)
        scores = replace(scores, metrics=own.metrics | scores.metrics, missing=own.missing | scores.missing)
    if trial.method.kind in ROUTED_KINDS and (heldout or tasks):
        routing = write_routing(model, tokenizer, heldout, rows, tasks, output)
        scores = replace(scores, facts=scores.facts | {"routing": routing_summary(routing)})
    return scores


def _write_heldout(own: HeldoutScores, heldout: Sequence[Encoded], output: Path) -> None:
    lines = [
        {
            "index": one.index,
            "loss": one.loss_nats,
            "loss_tokens": one.loss_tokens,
            "exact_match": None if heldout[one.index].cut else one.exact,
        }
        for one in own.examples
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / HELDOUT_FILE).write_text("".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))


def _score_heldout(
    model: nn.Module, tokenizer: Any, heldout: Sequence[Encoded], evaluation: Evaluation
) -> HeldoutScores:
    return score_heldout(
        model,
        heldout,
        pad_id=tokenizer.pad_token_id,
        batch_size=evaluation.batch_size,
        device=next(model.parameters()).device,
    )
