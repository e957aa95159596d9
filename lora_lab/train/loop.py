"""The training loop. One step of a member:

gather the micro-batches of the step
loss = sum over them of (sum of token losses) / (loss tokens of the whole step)     so k micro-batches equal one batch
     + the method's auxiliary losses, each with its weight
backward, clip, check that loss and gradient norm are finite, only then update
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_lab.data.batches import Batch, collate
from lora_lab.errors import Diverged
from lora_lab.models.loss_token_logits import LossTokenHead, loss_token_logits
from lora_lab.train.curvature import estimate_curvature
from lora_lab.train.member import Member, StepRecord

OnStep = Callable[[Member, StepRecord], None]


def train(model: nn.Module, members: Sequence[Member], *, pad_id: int, device: torch.device, on_step: OnStep) -> None:
    """Trains every member to its end, or to where it diverges; `on_step` hears of each finished step."""
    model.train()
    with loss_token_logits(model) as head:
        while active := [member for member in members if member.is_active]:
            for member in active:
                try:
                    record = take_step(member, head, pad_id=pad_id, device=device)
                except Diverged as reason:
                    member.diverged = str(reason)
                else:
                    member.records.append(record)
                    on_step(member, record)


def take_step(member: Member, head: LossTokenHead, *, pad_id: int, device: torch.device) -> StepRecord:
    """One optimizer step.

    Raises:
        Diverged: loss or gradient norm is not finite; no weight has been changed by this step.
    """
    start = time.perf_counter()
    if member.course is not None:
        member.course.before_step(member.step, member.optimizer)
    micro_batches = [
        collate([member.examples[index] for index in indices], pad_id, device)
        for indices in member.batches.step(member.step)
    ]
    loss_tokens = sum(int(batch.loss_mask.sum()) for batch in micro_batches)
    if member.curvature is not None and member.curvature.is_due(member.step):
        estimate_curvature(member, head, micro_batches[0], member.optimizer)
    auxiliary: dict[str, float] = {}
    loss = accumulate(member, head, micro_batches, loss_tokens=loss_tokens, auxiliary=auxiliary)
    gradient_norm = clip(member)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        member.optimizer.zero_grad(set_to_none=True)
        raise Diverged(f"step {member.step + 1}: loss {loss}, gradient norm {gradient_norm}")
    learning_rate = member.learning_rate(member.step)
    member.optimizer.step()
    member.schedule.step()
    if member.course is not None:
        member.course.after_step(member.step)
    member.optimizer.zero_grad(set_to_none=True)
    member.step += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return StepRecord(
        step=member.step,
        loss=loss,
        learning_rate=learning_rate,
        gradient_norm=gradient_norm,
        tokens=sum(int(batch.attention_mask.sum()) for batch in micro_batches),
        loss_tokens=loss_tokens,
        padded_tokens=sum(batch.input_ids.numel() for batch in micro_batches),
        seconds=time.perf_counter() - start,
        auxiliary=auxiliary,
    )


def accumulate(
    member: Member,
    head: LossTokenHead,
    micro_batches: Sequence[Batch],
    *,
    loss_tokens: int,
    auxiliary: dict[str, float] | None = None,
) -> float:
    """Forward and backward over the micro-batches of a step; gradients add up.

    Returns the step's mean token loss of the language model. The method's auxiliary losses, which are trained on with
    their weights and are never in that number, are added up by name in `auxiliary`, where it is given.
    """
    total = 0.0
    for index, batch in enumerate(micro_batches):
        if member.dropout_clock is not None:
            member.dropout_clock.step, member.dropout_clock.micro_batch = member.step, index
        if member.auxiliary is not None:
            member.auxiliary.open(batch.attention_mask, batch.types)
        loss = token_loss_sum(head, batch) / loss_tokens
        total += loss.item()
        share = batch.loss_tokens / loss_tokens
        for one in [] if member.auxiliary is None else member.auxiliary.close():
            loss = loss + one.weight * share * one.value
            if auxiliary is not None:
                auxiliary[one.name] = auxiliary.get(one.name, 0.0) + share * one.value.item()
        loss.backward()  # type: ignore[no-untyped-call]
    return total


def token_loss_sum(head: LossTokenHead, batch: Batch) -> Tensor:
    """Sum of the cross-entropies (nats) of a batch's loss tokens; half-precision logits are raised to fp32 first."""
    logits = head(input_ids=batch.input_ids, attention_mask=batch.attention_mask, loss_mask=batch.loss_mask)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return cross_entropy(logits, batch.input_ids[batch.loss_mask], reduction="sum")


def clip(member: Member) -> float:
    """Scales the member's gradients to `max_gradient_norm` where that is set; returns the norm before."""
    bound = math.inf if member.max_gradient_norm is None else member.max_gradient_norm
    return float(nn.utils.clip_grad_norm_(member.active_parameters, bound))
