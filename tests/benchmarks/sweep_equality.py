"""A run of ours and one of the Trainer that is fed alike: the same losses step by step, and the same weights.

The Trainer gets our order of rows and our micro-batches. Its loss is transformers' own, normalised by the loss tokens
of the step as ours is; initial weights, optimizer and schedule are each side's own, and equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer

from lora_lab.data.batches import Batch, Batches, collate
from lora_lab.data.encode import Encoded, encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.models.load import model_folder
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import read_steps
from lora_lab.schema.trial import Trial
from tests.benchmarks.train_trainer import NO_LOSS, arguments, examples_of, plain_model, plain_trainer

LOSS_TOLERANCE = 1e-4


class FedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """The Trainer on micro-batches made before; `losses`: of each micro-batch its share of the step's loss."""

    fed: Sequence[dict[str, torch.Tensor]] = ()

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.losses: list[float] = []

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Each of them once, in order."""
        return DataLoader(list(self.fed), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    def compute_loss(self, *args: Any, **settings: Any) -> Any:
        """Noted."""
        loss = super().compute_loss(*args, **settings)
        self.losses.append(float(loss.detach() if isinstance(loss, torch.Tensor) else loss[0].detach()))
        return loss


def micro_batches(trial: Trial, examples: Sequence[Encoded], pad_id: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """The first steps' micro-batches of a trial, as a Trainer takes them."""
    batches = Batches(
        [len(one.input_ids) for one in examples],
        batch_size=trial.training.batch_size,
        micro_batch_size=trial.training.micro_batch_size,
        seed=trial.seeds.data,
        bucket_batches=trial.training.bucket_batches,
    )
    return [
        _fed(collate([examples[index] for index in indices], pad_id, "cpu"))
        for step in range(steps)
        for indices in batches.step(step)
    ]


def _fed(batch: Batch) -> dict[str, torch.Tensor]:
    labels = torch.where(batch.loss_mask, batch.input_ids, NO_LOSS)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def fed_run(trial: Trial, cache: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses per step and the adapter's weights of the Trainer on a trial's own rows."""
    folder = model_folder(trial.model, cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = plain_model(folder, "qv", rank=trial.rank, alpha=trial.alpha, seed=trial.seeds.init)
    rows = load_rows(trial.data, cache=cache).train
    examples = encode_rows(rows, tokenizer, trial.data, vocab_size=model.config.vocab_size).examples
    steps = trial.training.max_steps
    assert steps is not None
    with TemporaryDirectory() as output:
        told = arguments(
            Path(output),
            batch=trial.training.batch_size,
            micro_batch=trial.training.micro_batch_size,
            steps=steps,
            learning_rate=trial.learning_rate,
            seed=trial.seed,
        )
        trainer: Any = plain_trainer(model, tokenizer, examples_of(examples), told, kind=FedTrainer)
        trainer.fed = micro_batches(trial, examples, tokenizer.pad_token_id, steps)
        trainer.train()
    pieces = trial.training.batch_size // trial.training.micro_batch_size
    losses = [sum(trainer.losses[start : start + pieces]) for start in range(0, steps * pieces, pieces)]
    return losses, get_peft_model_state_dict(model)


def compare_runs(trial: Trial, root: Path, cache: Path, *, log: Path) -> dict[str, Any]:
    """Of the trial as it stands in the ledger of `root`, and the Trainer's; what that prints goes to `log`.

    loss: the largest difference of a step's. weights: the largest difference of an entry, and the norm of all
    differences over that of the weights.
    """
    record = _record(trial, root)
    with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        losses, weights = fed_run(trial, cache)
    own = [float(step["loss"]) for step in read_steps(record.steps_path)]
    saved = load_file(record.adapter_folder / "adapter_model.safetensors")
    if set(saved) != set(weights) or len(own) != len(losses):
        raise ValueError(
            f"not the same run: {len(own)} and {len(losses)} steps, {len(saved)} and {len(weights)} tensors"
        )
    gaps = {name: saved[name] - weights[name].detach() for name in saved}
    loss = max(abs(one - other) for one, other in zip(own, losses, strict=True))
    return {
        "run": record.name,
        "executed": None if record.result is None else record.result.facts.get("executed"),
        "steps": len(own),
        "loss": loss,
        "weights": max(float(gap.abs().max()) for gap in gaps.values()),
        "weights_relative": _norm(gaps) / _norm(saved),
        "within": loss <= LOSS_TOLERANCE,
        "losses": {"ours": own, "theirs": losses},
    }


def _record(trial: Trial, root: Path) -> RunRecord:
    wanted = trial.model_dump(mode="json")
    for record in Ledger(root).runs():
        if record.trial == wanted:
            return record
    raise ValueError(f"the ledger of {root} has no such run")


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.sqrt(sum((one.double() ** 2).sum() for one in tensors.values())))  # type: ignore[arg-type]
