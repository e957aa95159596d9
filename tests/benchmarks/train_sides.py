"""The sides of `train_speed`, each a thing that takes one optimizer step when asked.

The lab's own are plain objects. The trainers of others run a loop of their own, which is held at the end of each step
until the next one is asked for: what they do around a step (data, schedule, callbacks, logging) is in its time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from lora_lab.adapters.attach import attach
from lora_lab.data.encode import Encoded
from lora_lab.memory.live_bytes import model_tensors
from lora_lab.models.load import LoadedBase, load_base, model_folder
from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.optim.optimizers import state_tensors
from lora_lab.schema.adaptation import Quantization
from lora_lab.schema.model import Model
from lora_lab.schema.trial import Trial
from lora_lab.train.loop import take_step
from lora_lab.train.member import member_of
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

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Side:
    """step: one optimizer step of every run of the side; returns its real tokens, padding not counted. tensors: all
    that lives between steps. network: what the forward pass goes through."""

    step: Callable[[], int]
    tensors: Callable[[], list[Tensor]]
    network: Any


def lab_side(trials: Sequence[Trial], rows: Sequence[Encoded], cache: Path) -> Side:
    """The lab's own: one trial alone, or several as a cohort."""
    return _solo(trials[0], rows, cache) if len(trials) == 1 else _cohort(trials, rows, cache)


def _solo(trial: Trial, rows: Sequence[Encoded], cache: Path) -> Side:
    base = _base(trial, cache)
    attached = attach(base.model, trial)
    member = member_of(trial, attached, rows, name="solo")
    attached.model.train()

    def step() -> int:
        with loss_token_logits(attached.model) as head:
            return take_step(member, head, pad_id=base.tokenizer.pad_token_id, device=CPU).tokens

    def tensors() -> list[Tensor]:
        return [*model_tensors(attached.model), *state_tensors(member.optimizer)]

    return Side(step, tensors, attached.model)


def _cohort(trials: Sequence[Trial], rows: Sequence[Encoded], cache: Path) -> Side:
    raise NotImplementedError("cohorts are not built yet")


def compile_layers(network: nn.Module) -> int:
    """Compiles every layer of the decoder's list of layers; how many there are."""
    layers = max(
        (module for module in network.modules() if isinstance(module, nn.ModuleList)), key=len, default=nn.ModuleList()
    )
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _base(trial: Trial, cache: Path) -> LoadedBase:
    """Modules of a side's own over weights that all sides of this process share."""
    loaded = _loaded(trial.model, trial.quantization, cache)
    network = loaded.model
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return LoadedBase(copy.deepcopy(network, shared), loaded.tokenizer, loaded.facts)


@remembered
def _loaded(model: Model, quantization: Quantization, cache: Path) -> LoadedBase:
    """Loaded once per process."""
    return load_base(model, precision="fp32", quantization=quantization, device=CPU, cache=cache)


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
