"""When and on what Sophia's curvature is estimated: the Gauss-Newton-Bartlett estimator every k steps.

Algorithm 3 of Liu et al. 2023 (arXiv 2305.14342): at steps 1, k + 1, 2k + 1, ... on one mini-batch, with labels drawn
from the model's own distribution. Here the mini-batch is the first micro-batch of the step; labels stand in for those
of its loss tokens and are drawn from the run's own seed and the step's number, so a resumed run draws the same. In the
first interval of a LoRA the estimate for A is zero (B is zero), and A moves by sign descent at the full rate. So does a
layer that LISA draws between two estimates, until the next.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lora_lab.optim.sophia import gauss_newton_bartlett
from lora_lab.schema.optimization import Sophia
from lora_lab.schema.trial import Trial

if TYPE_CHECKING:
    from lora_lab.train.member import Member


@dataclass(frozen=True, slots=True)
class CurvatureSchedule:
    """Every `interval` steps, the first included; labels are drawn from `seed` and the step."""

    interval: int
    seed: int

    def is_due(self, step: int) -> bool:
        """Whether step `step` (from 0) begins with an estimate."""
        return step % self.interval == 0


def curvature_of(trial: Trial) -> CurvatureSchedule | None:
    """The schedule of a trial that is trained with Sophia, else None."""
    optimizer = trial.optimizer
    if not isinstance(optimizer, Sophia):
        return None
    return CurvatureSchedule(optimizer.estimate_interval, trial.seeds.dropout)


def estimate_curvature(member: Member, logits: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Tells `optimizer` an estimate from `logits` [loss tokens, vocabulary], with graph; gradients stay as they are."""
    assert member.curvature is not None
    generator = torch.Generator(device=logits.device).manual_seed(_label_seed(member.curvature.seed, member.step))
    parameters = member.active_parameters
    estimates = gauss_newton_bartlett(logits, parameters, generator)
    cast(Any, optimizer).update_hessian(dict(zip(parameters, estimates, strict=True)))


def _label_seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"sophia labels {seed} {step}".encode()).digest()[:8], "big") >> 1
