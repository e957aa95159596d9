"""Single steps of training, for tests that look between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.train import loop
from lora_lab.train.forward import Alone
from lora_lab.train.member import Member, StepRecord
from lora_lab.train.probe import Probe, probe_step

CPU = torch.device("cpu")


def take_step(model: nn.Module, member: Member, *, pad_id: int = 256) -> StepRecord:
    """One optimizer step of `member` alone."""
    model.train()
    taken: list[StepRecord] = []
    with loss_token_logits(model) as head:
        while not taken:
            forward = Alone(head, pad_id=pad_id, device=CPU)
            loop.tick(forward, [member], on_step=lambda _, record: taken.append(record), timed=True)
    return taken[0]


def probe_alone(model: nn.Module, member: Member, *, pad_id: int = 256) -> Probe:
    """The memory probe of `member` alone."""
    model.train()
    with loss_token_logits(model) as head:
        return probe_step(Alone(head, pad_id=pad_id, device=CPU), model, member)


def poison(monkeypatch: pytest.MonkeyPatch, hits: Callable[[Member], bool]) -> None:
    """Makes the loss of every micro-batch NaN of whom `hits` is true."""
    clean = loop.gather

    def poisoned(forward: Any, members: Any) -> list[torch.Tensor]:
        losses = clean(forward, members)
        return [loss * float("nan") if hits(one) else loss for one, loss in zip(members, losses, strict=True)]

    monkeypatch.setattr(loop, "gather", poisoned)
