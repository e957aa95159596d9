"""The training loop. A tick is one micro-batch of every member, in one forward and one backward pass. A member's step:

loss = sum over its micro-batches of (sum of token losses) / (loss tokens of the step)      so k of them equal one batch
     + the method's auxiliary losses, each with its weight
backward, clip, check that loss and gradient norm are finite, only then update

Members whose step is complete update; the others go on gathering. What a member computes does not depend on the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.train.curvature import estimate_curvature
from lora_lab.train.forward import Alone, Forward, MicroBatch
from lora_lab.train.member import Member, OpenStep, StepRecord

OnStep = Callable[[Member, StepRecord], None]


def train(model: nn.Module, members: Sequence[Member], *, pad_id: int, device: torch.device, on_step: OnStep) -> None:
    """Trains each member of `model` by itself to its end, or to where it diverges; `on_step` hears of each step."""
    model.train()
    with loss_token_logits(model) as head:
        forward = Alone(head, pad_id=pad_id, device=device)
        for member in members:
            while member.is_active:
                tick(forward, [member], on_step=on_step, timed=True)


def tick(forward: Forward, members: Sequence[Member], *, on_step: OnStep, timed: bool) -> int:
    """A micro-batch of every member (all active); `on_step` hears of each step that it completes.

    timed: whether the seconds of a step are its member's own. Returns the real tokens of the pass.
    A member that diverges says so in `diverged`; no weight has been changed by its last step. After an error no weight
    has been changed either, but gradients may be half gathered: `Member.abandon_step` lets a step begin anew.
    """
    losses = gather(forward, members)
    tokens = sum(member.opened.last.tokens for member in members)
    complete = [member for member in members if member.opened.is_complete]
    norms = [clip(member) for member in complete]
    # One transfer for all: whether a step may be taken has to be known before it is.
    values = torch.stack([*losses, *(norm.to(losses[0]) for norm in norms)]).tolist()
    for member, value in zip(members, values, strict=False):
        member.opened.loss += value
    for member, norm in zip(complete, values[len(members) :], strict=True):
        record = _finish(member, norm, forward, timed=timed)
        if record is not None:
            member.records.append(record)
            on_step(member, record)
    return tokens


def gather(forward: Forward, members: Sequence[Member]) -> list[Tensor]:
    """Forward and backward over the next micro-batch of each member; gradients add up.

    Returns the share of each in its step's mean token loss of the language model, detached. The method's auxiliary
    losses, which are trained on with their weights and are never in that number, are added to the open step.
    """
    work = [_next(member, forward) for member in members]
    for member, one in zip(members, work, strict=True):
        if member.auxiliary is not None:
            member.auxiliary.open(_mask(one, forward.device), [example.type for example in one.examples])
    sums = forward(work)
    losses, shares = [], []
    for member, one, loss_sum in zip(members, work, sums, strict=True):
        step = member.opened
        share = loss_sum / step.loss_tokens
        shares.append(share.detach())
        loss, part = share, one.loss_tokens / step.loss_tokens
        for extra in [] if member.auxiliary is None else member.auxiliary.close():
            loss = loss + extra.weight * part * extra.value
            step.add_auxiliary(extra.name, part * extra.value.detach())
        losses.append(loss)
    torch.autograd.backward(losses)
    for member in members:
        member.opened.done += 1
    return shares


def clip(member: Member) -> Tensor:
    """Scales the member's gradients to `max_gradient_norm` where that is set; returns the norm before."""
    bound = math.inf if member.max_gradient_norm is None else member.max_gradient_norm
    norm: Tensor = nn.utils.clip_grad_norm_(member.active_parameters, bound)
    return norm


def _next(member: Member, forward: Forward) -> MicroBatch:
    """The member's next micro-batch, its dropout set to it; opens a step where none is open."""
    if member.open_step is None:
        if member.course is not None:
            member.course.before_step(member.step, member.optimizer)
        member.open_step = OpenStep(
            [
                MicroBatch(member.name, [member.examples[index] for index in indices])
                for indices in member.batches.step(member.step)
            ]
        )
        if member.curvature is not None and member.curvature.is_due(member.step):
            member.set_clock(0)
            estimate_curvature(member, forward.logits(member.opened.work[0]), member.optimizer)
    step = member.opened
    member.set_clock(step.done)
    return step.work[step.done]


def _finish(member: Member, norm: float, forward: Forward, *, timed: bool) -> StepRecord | None:
    """The update at the end of a step; None where the step diverged."""
    step, member.open_step = member.opened, None
    if not (math.isfinite(step.loss) and math.isfinite(norm)):
        member.optimizer.zero_grad(set_to_none=True)
        member.diverged = f"step {member.step + 1}: loss {step.loss}, gradient norm {norm}"
        return None
    learning_rate = member.learning_rate(member.step)
    member.optimizer.step()
    member.schedule.step()
    if member.course is not None:
        member.course.after_step(member.step)
    member.optimizer.zero_grad(set_to_none=True)
    member.step += 1
    if timed and forward.device.type == "cuda":
        torch.cuda.synchronize(forward.device)  # for the time of the step
    return StepRecord(
        step=member.step,
        loss=step.loss,
        learning_rate=learning_rate,
        gradient_norm=norm,
        tokens=sum(one.tokens for one in step.work),
        loss_tokens=step.loss_tokens,
        padded_tokens=sum(one.padded_tokens if forward.computes_padding else one.tokens for one in step.work),
        seconds=time.perf_counter() - step.started if timed else None,
        auxiliary={name: float(value) for name, value in step.auxiliary.items()},
    )


def _mask(one: MicroBatch, device: torch.device) -> Tensor:
    """[rows, length], 1 for real tokens."""
    lengths = torch.tensor([len(example.input_ids) for example in one.examples])
    return (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long().to(device)
