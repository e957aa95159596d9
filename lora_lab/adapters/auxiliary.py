"""The auxiliary losses of the methods that have some, and what routers are listened to for.

mola: load balancing; loramoe: the localized balancing constraint (both in `adapters.balance`); adalora: orthogonality
of its singular vectors. mov and molora have no loss of their own; their routers are only counted.
A loss of a step is the sum over its micro-batches, each weighted by its share of the loss tokens: routing losses are
not linear in the rows, so for them k micro-batches are not quite one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adalora import orthogonality_loss
from lora_lab.adapters.balance import KNOWLEDGE, OTHER_TASKS, load_balancing_loss, localized_balancing
from lora_lab.adapters.course import Auxiliary, AuxiliaryLoss
from lora_lab.adapters.routing import RoutingLog, RoutingTotals, set_routing_log
from lora_lab.schema.adapter_methods import AdaLora
from lora_lab.schema.expert_methods import Loramoe, Mola
from lora_lab.schema.method import ROUTED_KINDS
from lora_lab.schema.trial import Trial

# The log after the forward pass, its mask, the types of the B rows -> losses.
_Losses = Callable[[RoutingLog, Tensor, Sequence[str | None]], list[AuxiliaryLoss]]


def auxiliary_of(model: Any, trial: Trial, name: str) -> tuple[Auxiliary | None, RoutingTotals | None]:
    """What `model`, with adapter `name` of the trial, has beside the language model's loss; and the routers' totals."""
    method = trial.method
    if isinstance(method, AdaLora):
        return _Orthogonality(model, name, weight=method.orthogonality_weight), None
    if method.kind not in ROUTED_KINDS:
        return None, None
    log, totals = RoutingLog(), RoutingTotals(keep_sequences=False)
    set_routing_log(model, log, name)
    return _RouterLosses(log, totals, _losses_of(method)), totals


class _Orthogonality:
    def __init__(self, model: Any, name: str, *, weight: float) -> None:
        self._model, self._name, self._weight = model, name, weight

    def open(self, attention_mask: Tensor, types: Sequence[str | None]) -> None:
        """Nothing to listen to: the loss is one of the weights."""

    def close(self) -> list[AuxiliaryLoss]:
        return [AuxiliaryLoss("orthogonality_loss", orthogonality_loss(self._model, self._name), self._weight)]


class _RouterLosses:
    def __init__(self, log: RoutingLog, totals: RoutingTotals, losses: _Losses) -> None:
        self._log, self._totals, self._losses = log, totals, losses
        self._mask: Tensor | None = None
        self._types: Sequence[str | None] = ()

    def open(self, attention_mask: Tensor, types: Sequence[str | None]) -> None:
        self._mask, self._types = attention_mask, types
        self._log.open(attention_mask)

    def close(self) -> list[AuxiliaryLoss]:
        assert self._mask is not None  # `open` comes first
        losses = self._losses(self._log, self._mask, self._types)
        self._totals.add(self._log.entries, self._mask)
        self._log.clear()
        return losses


def _losses_of(method: Any) -> _Losses:
    if isinstance(method, Mola):
        return _load_balancing(method)
    if isinstance(method, Loramoe) and method.beta:
        return _localized_balancing(method)
    return lambda log, mask, types: []


def _load_balancing(method: Mola) -> _Losses:
    def losses(log: RoutingLog, mask: Tensor, types: Sequence[str | None]) -> list[AuxiliaryLoss]:
        return [AuxiliaryLoss("load_balancing_loss", load_balancing_loss(log.entries, mask), method.balance_weight)]

    return losses


def _localized_balancing(method: Loramoe) -> _Losses:
    """The first half of the experts is for the first of `groups`, as OTHER_TASKS is in the released code."""
    codes = dict(zip(method.groups, (OTHER_TASKS, KNOWLEDGE), strict=True))

    def losses(log: RoutingLog, mask: Tensor, types: Sequence[str | None]) -> list[AuxiliaryLoss]:
        rows = torch.tensor([codes[str(one)] for one in types])
        value = localized_balancing(log.entries, mask, rows, delta=method.delta, form=method.balance)
        return [AuxiliaryLoss("localized_balancing_loss", value, method.beta)]

    return losses
