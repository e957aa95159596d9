"""GaLore: gradient low-rank projection (Zhao et al. 2024, arXiv 2403.03507), around any optimizer.

Of a matrix's gradient G the optimizer sees R = P^T G (or G Q, or P^T G Q), keeps its states in that size, and what it
would change there is brought back: W <- W + scale P step(R). P and Q are singular vectors of the gradient, renewed
every `update_gap` steps. A step is an optimizer step, so accumulation over micro-batches is right.

As in the released code: `std` projects the shorter side away (on the right where there are at least as many rows as
columns), `reverse_std` the other one, `left`, `right` and `full` say it outright; the states are not turned along when
P changes; weight decay acts on the whole weight, after the step. GPT-2's Conv1D keeps its matrices transposed, so left
and right mean the other side there. Different from it: the optimizer inside is the trial's own. torch's AdamW adds eps
to the bias-corrected root of v, the released one to the raw root, a difference of the order of eps. It counts with
`full`: there a renewed basis makes the gradient diagonal, all else is rounding noise, and eps decides how far Adam
scales that up.

The sign of a singular vector is up to rounding. As the states are not turned along, two trainings that differ by
rounding alone (in how a batch is split) may part at a renewal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lab.errors import InputError, Problem
from lora_lab.optim.states import State, put_states

Side = Literal["std", "reverse_std", "left", "right", "full"]
# What of a matrix's state is not the inner optimizer's.
_OWN_STATE = ("left", "right", "projections")


@dataclass(frozen=True, slots=True)
class Projection:
    """How gradients of matrices are projected. rank: at most the smaller side of each of them."""

    rank: int
    update_gap: int
    scale: float
    side: Side

    def is_left(self, shape: torch.Size) -> bool:
        """Whether the rows of a matrix of this shape are projected (and the columns kept), for sides but `full`."""
        tall = shape[0] >= shape[1]
        return {"std": not tall, "reverse_std": tall, "left": True, "right": False}[self.side]

    def projected_shape(self, shape: torch.Size) -> tuple[int, int]:
        """The shape that the optimizer sees of a matrix."""
        if self.side == "full":
            return self.rank, self.rank
        return (self.rank, shape[1]) if self.is_left(shape) else (shape[0], self.rank)

    def basis_shapes(self, shape: torch.Size) -> dict[str, tuple[int, int]]:
        """The shapes of `basis` for a matrix of this shape."""
        both = {"left": (shape[0], self.rank), "right": (self.rank, shape[1])}
        return {name: both[name] for name in self._sides(shape)}

    def basis(self, gradient: Tensor) -> dict[str, Tensor]:
        """`left` [rows, rank] and `right` [rank, columns], what the side asks for; SVD in float32 or wider."""
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        u, _, vh = torch.linalg.svd(wide, full_matrices=False)
        both = {"left": u[:, : self.rank], "right": vh[: self.rank]}
        return {name: both[name].to(gradient.dtype).contiguous() for name in self._sides(gradient.shape)}

    def _sides(self, shape: torch.Size) -> tuple[str, ...]:
        if self.side == "full":
            return ("left", "right")
        return ("left",) if self.is_left(shape) else ("right",)


def down(gradient: Tensor, basis: Mapping[str, Tensor]) -> Tensor:
    """The gradient in the projected space."""
    result = basis["left"].T @ gradient if "left" in basis else gradient
    return result @ basis["right"].T if "right" in basis else result


def up(change: Tensor, basis: Mapping[str, Tensor]) -> Tensor:
    """A change in the projected space as a change of the whole matrix, before the scale."""
    result = basis["left"] @ change if "left" in basis else change
    return result @ basis["right"] if "right" in basis else result


class GaLore(torch.optim.Optimizer):
    """An optimizer over whole parameters whose work on some of them is done in a projected space by `inner`.

    stand_ins: whole matrix -> the small parameter that `inner` moves in its place (zeros of `projected_shape`). inner:
    holds the stand-ins and all other parameters, in groups that match `groups` one by one; rates are set on these and
    handed on. decay_gradient: weight decay belongs to the gradient (SGD) rather than to the weight.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        inner: torch.optim.Optimizer,
        stand_ins: Mapping[nn.Parameter, nn.Parameter],
        projection: Projection,
        *,
        decay_gradient: bool,
    ) -> None:
        self._inner, self._stand_ins, self._projection = inner, dict(stand_ins), projection
        self._decay_gradient = decay_gradient
        super().__init__(groups, {"lr": groups[0]["lr"]})

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that works in the projected space."""
        return self._inner

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group, own in zip(self.param_groups, self._inner.param_groups, strict=True):
            own["lr"] = group["lr"]
            for parameter in group["params"]:
                if parameter in self._stand_ins and parameter.grad is not None:
                    self._project(parameter, decay=own["weight_decay"] if self._decay_gradient else 0.0)
        self._inner.step()
        for group, own in zip(self.param_groups, self._inner.param_groups, strict=True):
            for parameter in group["params"]:
                if parameter in self._stand_ins and parameter.grad is not None:
                    self._bring_back(parameter, decay=0.0 if self._decay_gradient else own["lr"] * own["weight_decay"])
        self._show_states()
        return loss

    def _project(self, parameter: nn.Parameter, *, decay: float) -> None:
        state, stand_in = self.state[parameter], self._stand_ins[parameter]
        assert parameter.grad is not None
        gradient = parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad
        count = state.get("projections", 0)
        if count % self._projection.update_gap == 0:
            state.update(self._projection.basis(gradient))
        state["projections"] = count + 1
        stand_in.zero_()
        stand_in.grad = down(gradient, _basis_of(state))

    def _bring_back(self, parameter: nn.Parameter, *, decay: float) -> None:
        stand_in = self._stand_ins[parameter]
        parameter.add_(up(stand_in, _basis_of(self.state[parameter])), alpha=self._projection.scale)
        if decay:
            parameter.mul_(1 - decay)
        stand_in.grad = None

    def _show_states(self) -> None:
        """The inner optimizer's states under the whole parameter, where states are looked for and counted."""
        for group in self.param_groups:
            for parameter in group["params"]:
                stand_in = self._stand_ins.get(parameter)
                own = self._inner.state.get(parameter if stand_in is None else stand_in)
                self.state[parameter].update(own or {})

    def put_states(self, states: Mapping[nn.Parameter, State], names: Mapping[nn.Parameter, str]) -> None:
        """Bases and counts, and the states of the optimizer inside; see `optim.states.put_states`."""
        own: dict[nn.Parameter, dict[str, Any]] = {}
        rest: dict[nn.Parameter, dict[str, Any]] = {}
        for parameter, state in states.items():
            own[parameter] = {key: _copied(state[key], parameter) for key in _OWN_STATE if key in state}
            inside = {key: value for key, value in state.items() if key not in _OWN_STATE}
            if inside:
                rest[self._stand_ins.get(parameter, parameter)] = inside
        if problems := [problem for one in own for problem in self._misfits(one, own[one], names[one])]:
            raise InputError(problems)
        inner_names = {self._stand_ins.get(one, one): name for one, name in names.items()}
        put_states(self._inner, rest, inner_names)
        for parameter, kept in own.items():
            self.state[parameter] = kept
        self._show_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state of `state_dict()`: bases, counts, and the states of the optimizer inside."""
        super().load_state_dict(state_dict)
        self.state.clear()  # torch has cast every state to its parameter's dtype, which 8-bit states do not survive
        self._inner.state.clear()
        keys = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = [one for group in self.param_groups for one in group["params"]]
        saved = {one: state_dict["state"].get(key) for key, one in zip(keys, parameters, strict=True)}
        names = {one: f"parameter {index}" for index, one in enumerate(parameters)}
        self.put_states({one: state for one, state in saved.items() if state}, names)
        for group, own in zip(self.param_groups, self._inner.param_groups, strict=True):
            own["lr"] = group["lr"]

    def _misfits(self, parameter: nn.Parameter, own: Mapping[str, Any], name: str) -> list[Problem]:
        if parameter not in self._stand_ins:
            return [Problem(name, "has a basis and is not projected here")] if own else []
        if "projections" not in own:
            return [Problem(name, "has no basis and is projected here")]
        found = {key: tuple(one.shape) for key, one in _basis_of(own).items()}
        wanted = self._projection.basis_shapes(parameter.shape)
        return [] if found == wanted else [Problem(name, f"bases of sizes {found}, here they are {wanted}")]


def _copied(value: Any, parameter: nn.Parameter) -> Any:
    return value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value


def _basis_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: state[name] for name in ("left", "right") if name in state}
