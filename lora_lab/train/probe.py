"""Peak allocated memory on a CPU: one step on the longest micro-batch, counted tensor by tensor, then undone.

The step is left out of time, speed and the log: weights are restored, optimizer state is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lab.memory.live_bytes import LiveBytes, model_tensors, storage_bytes
from lora_lab.optim.optimizers import state_tensors
from lora_lab.train.curvature import estimate_curvature
from lora_lab.train.forward import Forward, MicroBatch
from lora_lab.train.loop import clip, gather
from lora_lab.train.member import Member, OpenStep


@dataclass(frozen=True, slots=True)
class Probe:
    """Live bytes at the peak of a step, and of the gradients at its end. What is neither weight, nor gradient, nor
    optimizer state at the peak is activations and the temporaries of operations."""

    peak_bytes: int
    gradient_bytes: int


def probe_step(forward: Forward, model: nn.Module, member: Member) -> Probe:
    """Counts a step as every one from the second on is: weights, optimizer state, gradients, activations.

    model: the member's own, whose tensors are alive; no other member takes part. With several micro-batches a step the
    gradients of the earlier ones are alive already; so they are here. Of Sophia it is a step with an estimate. Of
    GaLore it is one between two renewals: what the SVD of a matrix takes is left out.
    """
    parameters = member.active_parameters
    weights = [parameter.detach().clone() for parameter in parameters]
    optimizer = member.build_optimizer()
    batch = MicroBatch(member.name, [member.examples[index] for index in member.batches.longest_micro_batch()])
    try:
        _zero_gradients(member)
        optimizer.step()  # creates the state
        if len(member.batches.step(0)) == 1:
            optimizer.zero_grad(set_to_none=True)
        baseline = [*model_tensors(model), *_gradients(member), *state_tensors(optimizer)]
        with LiveBytes(baseline) as counter:
            if member.curvature is not None:
                member.set_clock(0)
                estimate_curvature(member, forward.logits(batch), optimizer)
            member.open_step = OpenStep([batch])
            gather(forward, [member])
            clip(member)
            gradient_bytes = storage_bytes(_gradients(member))
            optimizer.step()
        return Probe(counter.peak_bytes, gradient_bytes)
    finally:
        member.open_step = None
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)


def _zero_gradients(member: Member) -> None:
    for parameter in member.active_parameters:
        parameter.grad = torch.zeros_like(parameter)


def _gradients(member: Member) -> Iterable[Tensor]:
    return [parameter.grad for parameter in member.active_parameters if parameter.grad is not None]
