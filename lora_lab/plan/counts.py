"""Parameter counts of a trial by arithmetic: exact, from the shape alone, None where the shape is not known.

A LoRA pair on a layer with `in` inputs and `out` outputs holds rank x (in + out) numbers (Hu et al. 2021); on an
embedding in = vocabulary and out = hidden size, as in PEFT. DoRA adds one magnitude per output (Liu et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lora_lab.plan import shapes
from lora_lab.plan.shapes import Module
from lora_lab.plan.targets import selected_modules
from lora_lab.schema.trial import Trial


@dataclass(frozen=True, slots=True)
class Counts:
    """adapter: what the method adds; trainable: what receives gradients; total: base, untied copy and adapter."""

    adapter_parameters: int
    trainable_parameters: int
    total_parameters: int


def counts_of(trial: Trial) -> Counts | None:
    """All three counts of a trial, or None where the model's shape is not known.

    Raises:
        InputError: for a target that does not fit the model (`plan.targets`).
    """
    shape, modules = trial.model.shape, selected_modules(trial)
    if shape is None or modules is None:
        return None
    base = shapes.total_parameters(shape, tie_embeddings=trial.model.tie_embeddings)
    inputs, outputs = _widths(modules)
    adapter = trial.rank * (inputs + outputs)
    if trial.method.kind == "dora":
        adapter += outputs
    trainable = base if trial.method.kind == "full" else adapter
    return Counts(adapter_parameters=adapter, trainable_parameters=trainable, total_parameters=base + adapter)


@lru_cache(maxsize=1024)
def _widths(modules: tuple[Module, ...]) -> tuple[int, int]:
    return sum(module.in_features for module in modules), sum(module.out_features for module in modules)


def adapter_parameters(trial: Trial) -> int | None:
    """Parameters the method adds to the model; 0 for base and full."""
    counts = counts_of(trial)
    return None if counts is None else counts.adapter_parameters


def trainable_parameters(trial: Trial) -> int | None:
    """Parameters that receive gradients: 0 for base, every weight for full, else the adapter's."""
    counts = counts_of(trial)
    return None if counts is None else counts.trainable_parameters


def total_parameters(trial: Trial) -> int | None:
    """Parameters of the model as trained: base, the copy that untying makes, and adapter."""
    counts = counts_of(trial)
    return None if counts is None else counts.total_parameters
