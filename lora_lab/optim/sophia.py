"""Sophia-G (Liu et al. 2023, arXiv 2305.14342): momentum, clipped where it exceeds a curvature estimate.

m <- b1 m + (1 - b1) g,   h <- b2 h + (1 - b2) h^ every k steps,
theta <- theta - lr wd theta - lr clip(m / max(rho h, eps), 1).

h^ = N g^ * g^ is the Gauss-Newton-Bartlett estimate (algorithm 2): g^ is the gradient of the mean loss over N tokens
against labels drawn from the model's own distribution. The released code keeps the mean of g^ * g^ and multiplies by
its batch size in tokens where it divides; that is the same where every batch has as many tokens, and here N is the
number of tokens that the estimate was made on. As in that code |m| / (rho h + 1e-15) is cut at 1: where h is zero the
step is lr sign(m). h starts at zero and takes about k / (1 - b2) steps to reach its size (1,000 with the published
k and b2), so a short fine-tuning is clipped more than rho suggests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_EPS = 1e-15


class Sophia(torch.optim.Optimizer):
    """params: parameters or groups of them. rho: where the momentum is clipped. weight_decay: decoupled."""

    def __init__(self, params: Any, lr: float, *, betas: tuple[float, float], rho: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})

    @torch.no_grad()
    def update_hessian(self, estimates: Mapping[nn.Parameter, Tensor]) -> None:
        """Moves h towards new estimates, of the parameters' shapes."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in estimates:
                    hessian = self._state_of(parameter)["hessian"]
                    hessian.lerp_(estimates[parameter].to(hessian.dtype), 1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        state, rate = self._state_of(parameter), group["lr"]
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["betas"][0])
        parameter.mul_(1 - rate * group["weight_decay"])
        ratio = (momentum.abs() / (group["rho"] * state["hessian"] + _EPS)).clamp_(max=1)
        parameter.addcmul_(momentum.sign(), ratio, value=-rate)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["hessian"] = torch.zeros_like(parameter)
        return state


def gauss_newton_bartlett(
    logits: Tensor, parameters: Sequence[nn.Parameter], generator: torch.Generator
) -> list[Tensor]:
    """Estimates of the diagonal of the Gauss-Newton matrix of the mean loss, one per parameter; unbiased.

    logits: [N, vocabulary] of the tokens that count, with graph. generator: draws the labels, on the logits' device. A
    parameter that the logits do not depend on gets zeros.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    labels = torch.multinomial(wide.detach().softmax(-1), 1, generator=generator).squeeze(1)
    loss = nn.functional.cross_entropy(wide, labels)
    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    count = len(labels)
    return [
        torch.zeros_like(parameter) if gradient is None else count * gradient * gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
