"""Parameter counts of a trial by arithmetic: exact, from the shape alone, None where the shape is not known."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lab.plan import shapes
from lora_lab.plan.method_counts import Added, added_parameters
from lora_lab.plan.weight_counts import trained_weights
from lora_lab.schema.trial import Trial


@dataclass(frozen=True, slots=True)
class Counts:
    """adapter: what the method adds, without its routers; router: those; trainable: what receives gradients, None where
    that changes at random in the course of training; total: base, untied copy, adapter and routers."""

    adapter_parameters: int
    router_parameters: int
    trainable_parameters: int | None
    total_parameters: int


def counts_of(trial: Trial) -> Counts | None:
    """All counts of a trial, or None where the model's shape is not known.

    Raises:
        InputError: for a target, a rank or a list over layers that does not fit the model.
    """
    shape = trial.model.shape
    if shape is None:
        return None
    base = shapes.total_parameters(shape, tie_embeddings=trial.model.tie_embeddings)
    added = added_parameters(trial, shape) if trial.method.has_adapter else Added(0, 0, 0)
    trainable: int | None = added.adapter + added.router
    if trial.method.trains == "weights":
        trainable = trained_weights(trial, shape, base)
    return Counts(
        adapter_parameters=added.adapter,
        router_parameters=added.router,
        trainable_parameters=trainable,
        total_parameters=base + added.adapter + added.router + added.frozen,
    )


def adapter_parameters(trial: Trial) -> int | None:
    """Parameters the method adds to the model, routers apart; 0 where it trains the model's own weights."""
    counts = counts_of(trial)
    return None if counts is None else counts.adapter_parameters


def router_parameters(trial: Trial) -> int | None:
    """Parameters of the routers of a mixture of experts; 0 for other methods."""
    counts = counts_of(trial)
    return None if counts is None else counts.router_parameters


def trainable_parameters(trial: Trial) -> int | None:
    """Parameters that receive gradients: 0 for base, every weight for full, else the adapter's."""
    counts = counts_of(trial)
    return None if counts is None else counts.trainable_parameters


def total_parameters(trial: Trial) -> int | None:
    """Parameters of the model as trained: base, the copy that untying makes, and adapter."""
    counts = counts_of(trial)
    return None if counts is None else counts.total_parameters
