"""The sides of `train_speed`, each a thing that takes one optimizer step when asked.

The lab's own are plain objects. The trainers of others run a loop of their own, which is held at the end of each step
until the next one is asked for: what they do around a step (data, schedule, callbacks, logging) is in its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import Trainer

from lora_lab.adapters.attach import attach
from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.data.encode import Encoded
from lora_lab.memory.live_bytes import model_tensors
from lora_lab.memory.malloc import keep_freed
from lora_lab.models.load import model_folder
from lora_lab.models.shared_copy import shared_copy
from lora_lab.optim.optimizers import state_tensors
from lora_lab.schema.trial import Trial
from lora_lab.train.forward import Together
from lora_lab.train.loop import tick
from lora_lab.train.member import member_of
from tests.benchmarks.train_rows import base_of
from tests.benchmarks.train_trainer import (
    AtEachStep,
    arguments,
    counting,
    examples_of,
    lora_config,
    plain_model,
    plain_trainer,
    trl_trainer,
)


@dataclass(frozen=True, slots=True)
class Side:
    """step: one optimizer step of every run of the side; returns its real tokens, padding not counted. tensors: all
    that lives between steps. network: what the forward pass goes through."""

    step: Callable[[], int]
    tensors: Callable[[], list[Tensor]]
    network: Any


def lab_side(trials: Sequence[Trial], rows: Sequence[Encoded], cache: Path) -> Side:
    """The lab's own: these trials on one trunk, one alone as several."""
    keep_freed()  # as a sweep does
    base = _plain(trials[0], cache)
    forward = Together(Trunk(base))
    members = []
    for index, trial in enumerate(trials):
        attached = attach(shared_copy(base), trial)
        attached.model.train()
        forward.trunk.join(str(index), attached.model)
        members.append(member_of(trial, attached, rows, name=str(index)))

    def step() -> int:
        before = [member.step for member in members]
        tokens = 0
        while open_ones := [one for one, count in zip(members, before, strict=True) if one.step == count]:
            tokens += tick(forward, open_ones, on_step=lambda _member, _record: None, timed=False)
        return tokens

    def tensors() -> list[Tensor]:
        own = [tensor for one in members for tensor in (*one.parameters, *state_tensors(one.optimizer))]
        return [*model_tensors(forward.trunk.model), *own]

    return Side(step, tensors, forward.trunk.model)


_bases: dict[str, Any] = {}


def _plain(trial: Trial, cache: Path) -> Any:
    """The base, loaded once per process; what is put on copies of it does not reach it."""
    key = trial.model.model_dump_json()
    if key not in _bases:
        _bases[key] = base_of(trial, cache).model
    return _bases[key]


def run_rival(
    side: str, trial: Trial, rows: Sequence[Encoded], tokenizer: Any, cache: Path, *, hold: Callable[[int], bool]
) -> None:
    """Trains with another library's trainer; `hold` is told the real tokens of each step, and says whether to go on."""
    folder = model_folder(trial.model, cache)
    target = "all_linear" if trial.target.mlp else "qv"
    with TemporaryDirectory() as output:
        told = arguments(
            Path(output),
            batch=trial.training.batch_size,
            micro_batch=trial.training.micro_batch_size,
            steps=trial.training.max_steps or 1,
            learning_rate=trial.learning_rate,
            seed=trial.seed,
        )
        if side == "trainer":
            model = plain_model(folder, target, rank=trial.rank, alpha=trial.alpha, seed=trial.seeds.init)
            trainer: Any = plain_trainer(model, tokenizer, examples_of(rows), told, kind=counting(Trainer))
        else:
            lora = lora_config(target, rank=trial.rank, alpha=trial.alpha)
            trainer = trl_trainer(folder, tokenizer, examples_of(rows), told, lora=lora, keep=side == "trl_kept")
        before = 0

        def step_is_through() -> bool:
            nonlocal before
            tokens, before = trainer.real_tokens - before, trainer.real_tokens
            return hold(tokens)

        trainer.add_callback(AtEachStep(step_is_through))
        trainer.train()
