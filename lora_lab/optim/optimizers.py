"""The optimizers by name: torch's and bitsandbytes', looked up in one plain table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lora_lab.optim.groups import RateGroup
from lora_lab.optim.sophia import Sophia as SophiaG
from lora_lab.schema.optimization import Adam, Lion, Optimizer, Sgd, Sophia

# From this size on bitsandbytes pages a state, where that is asked for (`Optimizer8bit.get_state_buffer`).
PAGED_ELEMENTS = 100_000

# torch's parameter groups: `params`, and the `lr` of each.
Parameters = list[dict[str, Any]]


def _adamw(settings: Adam, parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    # Fused: one call for all tensors instead of a dozen for each.
    return torch.optim.AdamW(
        parameters, lr=rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


def _sgd(settings: Sgd, parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _bitsandbytes_adam(name: str) -> Callable[[Adam, Parameters, float], torch.optim.Optimizer]:
    def build(settings: Adam, parameters: Parameters, rate: float) -> torch.optim.Optimizer:
        import bitsandbytes  # only by those who ask for it: a machine without it runs everything else

        kind: Callable[..., torch.optim.Optimizer] = getattr(bitsandbytes.optim, name)
        return kind(parameters, lr=rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)

    return build


def _lion(settings: Lion, parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    import bitsandbytes

    lion: torch.optim.Optimizer = bitsandbytes.optim.Lion(
        parameters, lr=rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    return lion


def _sophia(settings: Sophia, parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    return SophiaG(parameters, lr=rate, betas=settings.betas, rho=settings.rho, weight_decay=settings.weight_decay)


OPTIMIZERS: dict[str, Callable[[Any, Parameters, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adamw8bit": _bitsandbytes_adam("AdamW8bit"),
    "paged_adamw": _bitsandbytes_adam("PagedAdamW32bit"),
    "paged_adamw8bit": _bitsandbytes_adam("PagedAdamW8bit"),
    "lion": _lion,
    "sophia": _sophia,
}


def build_optimizer(
    settings: Optimizer, parameters: Iterable[nn.Parameter] | Iterable[RateGroup], *, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of a trial over its trainable parameters: in one group, or in groups of a learning rate each."""
    given = list(parameters)
    groups = [one for one in given if isinstance(one, RateGroup)]
    plain = [one for one in given if isinstance(one, nn.Parameter)]
    if plain:
        groups.append(RateGroup(1.0, plain))
    # bitsandbytes warns once per tensor that paging needs CUDA; `optimizer_facts` records it instead.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    rates = [{"params": group.parameters, "lr": learning_rate * group.factor} for group in groups]
    return OPTIMIZERS[settings.kind](settings, rates, learning_rate)


def build_schedule(optimizer: torch.optim.Optimizer, multiplier: Callable[[int], float]) -> LambdaLR:
    """Scales the peak rate by `multiplier(step)`, steps counted from 0."""
    return LambdaLR(optimizer, multiplier)


def optimizer_facts(optimizer: torch.optim.Optimizer, *, device: torch.device) -> dict[str, Any]:
    """What really runs: the class, and whether its states live in paged memory (CUDA only)."""
    inner: Any = getattr(optimizer, "inner", optimizer)  # GaLore has the trial's own optimizer inside
    asked = bool(getattr(inner, "is_paged", False))
    kind = type(inner)
    facts: dict[str, Any] = {
        "class": f"{kind.__module__.split('.')[0]}.{kind.__name__}",
        "paging": "active" if asked and device.type == "cuda" else "off",
    }
    if asked and device.type != "cuda":
        facts["paging"] = f"asked for, not active on {device.type}: states are ordinary memory"
    return facts


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of the optimizer's state; none before the first step. bitsandbytes shares code books between them."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
