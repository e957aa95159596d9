"""The optimizer of a GaLore trial: the trial's own one, in the projected space of the matrices its target names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lora_lab.adapters.select import find_targets
from lora_lab.errors import InputError, Problem
from lora_lab.optim.galore import GaLore, Projection
from lora_lab.optim.groups import RateGroup
from lora_lab.schema.trial import Trial
from lora_lab.schema.weight_methods import Galore


def projected(
    trial: Trial,
    model: Any,
    groups: Sequence[RateGroup],
    build: Callable[[Sequence[RateGroup]], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """`build` makes the trial's optimizer over groups of parameters; what it is given here are small stand-ins.

    Raises:
        InputError: a matrix whose smaller side is below the rank.
    """
    method = trial.method
    assert isinstance(method, Galore)
    projection = Projection(trial.rank, method.update_gap, method.scale, method.side)
    stand_ins = _stand_ins(trial, model, projection)
    inner = build([RateGroup(group.factor, [stand_ins.get(one, one) for one in group.parameters]) for group in groups])
    rates = [{"params": group.parameters, "lr": trial.learning_rate * group.factor} for group in groups]
    return GaLore(rates, inner, stand_ins, projection, decay_gradient=trial.optimizer.kind == "sgd")


def _stand_ins(trial: Trial, model: Any, projection: Projection) -> dict[nn.Parameter, nn.Parameter]:
    found: dict[nn.Parameter, nn.Parameter] = {}
    for name in find_targets(model, trial.target, kind="galore"):
        weight: nn.Parameter = model.get_submodule(name).weight
        if trial.rank > min(weight.shape):
            rule = f"must be <= {min(weight.shape)}, the smaller side of {name}, got {trial.rank}"
            raise InputError(Problem("rank", rule))
        found[weight] = nn.Parameter(weight.detach().new_zeros(projection.projected_shape(weight.shape)))
    return found
