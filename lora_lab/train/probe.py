"""Peak allocated memory of a step: one step on the longest micro-batch, counted tensor by tensor, then undone.

With real tensors this is the measurement on a CPU; with fake ones (`predict.traced_step`) it is the prediction. The
step is left out of time, speed and the log: weights are restored, optimizer state is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lab.memory.live_bytes import Inside, LiveBytes, constants_of, storage_bytes
from lora_lab.models.packed import is_four_bit
from lora_lab.optim.optimizers import state_tensors
from lora_lab.plan.timeline import Place, Timeline
from lora_lab.train.curvature import estimate_curvature
from lora_lab.train.forward import Forward, MicroBatch
from lora_lab.train.loop import clip, gather
from lora_lab.train.member import Member, OpenStep
from lora_lab.train.places import WatchedForward, placed


@dataclass(frozen=True, slots=True)
class Probe:
    """Live bytes at the peak of a step, of the gradients at its end, and the whole course between."""

    peak_bytes: int
    gradient_bytes: int
    timeline: Timeline


def probe_step(
    forward: Forward,
    model: nn.Module,
    member: Member,
    *,
    layers: Iterable[nn.Module] = (),
    block_bytes: int = 1,
) -> Probe:
    """Counts a step as every one from the second on is: weights, optimizer state, gradients, activations.

    model: the member's own, whose tensors are alive; no other member takes part. layers: decoder layers of what
    `forward` calls, for the places of the timeline. block_bytes: see `LiveBytes`. With several micro-batches a step the
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
        counter = LiveBytes(_known(model, member, optimizer), block_bytes=block_bytes, inside=_inside_products(model))
        watched = WatchedForward(forward, counter)
        with counter, placed(list(layers), counter):
            if member.curvature is not None:
                member.set_clock(0)
                estimate_curvature(member, watched.logits(batch), optimizer)
            member.open_step = OpenStep([batch])
            gather(watched, [member])
            counter.claim("gradients", _gradients(member))
            counter.place = Place("clip")
            clip(member)
            gradient_bytes = storage_bytes(_gradients(member))
            counter.place = Place("update")
            optimizer.step()
        return Probe(counter.peak_bytes, gradient_bytes, counter.timeline())
    finally:
        member.open_step = None
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)


def _known(model: nn.Module, member: Member, optimizer: torch.optim.Optimizer) -> list[tuple[str, Iterable[Tensor]]]:
    """What is alive before the step, by part, in the order in which it came: the base module by module, then the rest.

    Of several parts that a tensor might be, the first.
    """
    adapter = member.parameters if isinstance(model, PeftModel) else []
    later = {id(parameter) for parameter in adapter}
    known: list[tuple[str, Iterable[Tensor]]] = []
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in later:
                # Those of int8 layers are buffers, those of 4-bit ones belong to the weight.
                known.append(("quantization_constants" if name == "row_scales" else "weights", [tensor]))
                known.append(("quantization_constants", constants_of(tensor)))
    return [
        *known,
        ("adapter", adapter),
        ("gradients", _gradients(member)),
        ("optimizer_state", [state for state in state_tensors(optimizer) if not getattr(state, "is_paged", False)]),
    ]


def _inside_products(model: nn.Module) -> Inside:
    """What 4-bit products of `model` make and drop within one operation: the whole weight in the input's dtype.

    bitsandbytes does so on a CPU, and on CUDA wherever a call has many rows (from a few dozen on some cards, from 1,500
    on others); for fewer its kernels there need no copy, and this counts too much.
    """
    if not any(is_four_bit(layer) for layer in model.modules()):
        return {}

    def copied(rows: Tensor, weight: Tensor, shape: Sequence[int], *others: Any, **more: Any) -> int:
        return math.prod(shape) * rows.element_size()

    return {torch.ops.bitsandbytes.gemm_4bit.default: copied}


def _zero_gradients(member: Member) -> None:
    for parameter in member.active_parameters:
        parameter.grad = torch.zeros_like(parameter)


def _gradients(member: Member) -> list[Tensor]:
    return [parameter.grad for parameter in member.active_parameters if parameter.grad is not None]
