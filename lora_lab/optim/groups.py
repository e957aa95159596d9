"""Parameters by learning rate: factors of decoder layers (`training.layer_rates`), and LoRA+'s factor of B.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B is trained at `ratio` times the rate of A. The authors' code gives an
adapter on an embedding a rate of its own; here its B is a B like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lora_lab.plan.layer_groups import layer_of, per_layer
from lora_lab.schema.adapter_methods import LoraPlus
from lora_lab.schema.trial import Trial

_B = (".lora_B.", ".lora_embedding_B.")


@dataclass(frozen=True, slots=True)
class RateGroup:
    """Parameters that are trained at `factor` times the trial's learning rate."""

    factor: float
    parameters: list[nn.Parameter]


def rate_groups(trial: Trial, named: Iterable[tuple[str, nn.Parameter]], *, num_layers: int) -> list[RateGroup]:
    """The parameters in groups of one factor each, in order of appearance; one group where all factors are 1.

    Raises:
        InputError: more entries in `training.layer_rates` than layers.
    """
    rates = trial.training.layer_rates
    by_layer: Sequence[float] = per_layer(rates, num_layers, where="training.layer_rates") if rates else ()
    groups: dict[float, RateGroup] = {}
    for name, parameter in named:
        layer = layer_of(name)
        factor = 1.0 if not by_layer or layer is None else by_layer[layer]
        if isinstance(trial.method, LoraPlus) and any(part in name for part in _B):
            factor *= trial.method.ratio
        groups.setdefault(factor, RateGroup(factor, [])).parameters.append(parameter)
    return list(groups.values())
