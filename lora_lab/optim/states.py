"""What an optimizer has learnt, by parameter: taken out to be kept, and put into a fresh optimizer of the same kind.

`Optimizer.load_state_dict` is not used: it goes by position, which moves where the set of trained layers does (LISA);
it casts states to the parameter's dtype; and it makes ordinary memory of bitsandbytes' paged states and a code book of
its own for every parameter. Here each state goes to its parameter, in the dtype it had, and bitsandbytes makes its own
buffers, which are then filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lora_lab.errors import InputError, Problem

State = Mapping[str, Any]
# What bitsandbytes keeps beside each 8-bit state and shares between all: constants.
_CODE_BOOK = "qmap"
# Of a parameter group: its members, the rate of the moment, and ways to compute the same.
_NOT_SETTINGS = ("params", "lr", "foreach", "fused", "capturable", "differentiable")


@runtime_checkable
class PutsStates(Protocol):
    """An optimizer that has another one inside."""

    def put_states(self, states: Mapping[nn.Parameter, State], names: Mapping[nn.Parameter, str]) -> None:
        """See the function of that name."""


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """JSON values that two optimizers share if and only if one may go on from the states of the other."""
    inner = getattr(optimizer, "inner", None)
    kind = type(optimizer)
    return {
        "class": f"{kind.__module__.partition('.')[0]}.{kind.__name__}",
        "groups": [
            {key: value for key, value in group.items() if key not in _NOT_SETTINGS} for group in optimizer.param_groups
        ],
        "inner": None if inner is None else settings_of(inner),
    }


def states_of(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
    """The states of every parameter that has one: the optimizer's own tensors, and numbers."""
    found = {parameter: state for parameter, state in optimizer.state.items() if state}
    return {
        cast(nn.Parameter, parameter): {key: value for key, value in state.items() if not key.startswith(_CODE_BOOK)}
        for parameter, state in found.items()
    }


def put_states(
    optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, State], names: Mapping[nn.Parameter, str]
) -> None:
    """Gives an optimizer that has not taken a step the states that `states_of` has found, as copies.

    names: of the parameters, for messages.

    Raises:
        InputError: a state that does not fit its parameter, or this kind of optimizer; which is then left as it was.
    """
    if isinstance(optimizer, PutsStates):
        optimizer.put_states(states, names)
        return
    made: dict[nn.Parameter, dict[str, Any]] = {}
    problems: list[Problem] = []
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter not in states:
                continue
            if hasattr(optimizer, "init_state"):
                made[parameter] = _initial(optimizer, group, parameter, (index, position))
            else:
                made[parameter] = _plain(states[parameter], parameter, group)
            problems += _fill(made[parameter], states[parameter], names[parameter])
    problems += [Problem(names[one], "is not among the optimizer's parameters") for one in states if one not in made]
    if problems:
        raise InputError(problems)
    for parameter, state in made.items():
        optimizer.state[parameter] = state


def _initial(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter, place: tuple[int, int]
) -> dict[str, Any]:
    """The states that bitsandbytes begins with, in memory of the kind it wants; the optimizer keeps none of them."""
    cast(Any, optimizer).init_state(group, parameter, *place)
    made: dict[str, Any] = optimizer.state.pop(parameter)
    return made


def _plain(state: State, parameter: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
    """Empty states as torch's optimizers, and Sophia, have them: like the parameter, but for the counter of steps."""
    counts_on_device = group.get("fused") or group.get("capturable")
    made: dict[str, Any] = {}
    for key, value in state.items():
        if key == "step" and isinstance(value, Tensor):
            made[key] = torch.empty((), dtype=value.dtype, device=parameter.device if counts_on_device else "cpu")
        else:
            made[key] = torch.empty_like(parameter.detach()) if isinstance(value, Tensor) else value
    return made


@torch.no_grad()
def _fill(made: dict[str, Any], state: State, name: str) -> list[Problem]:
    """Copies `state` into what was made for it; what does not fit."""
    wanted = {key for key in made if not key.startswith(_CODE_BOOK)}
    given = {key for key in state if not key.startswith(_CODE_BOOK)}
    if wanted != given:
        return [Problem(name, f"optimizer states {sorted(given)}, this optimizer has {sorted(wanted)}")]
    problems = []
    for key in sorted(wanted):
        old, new = state[key], made[key]
        if not isinstance(new, Tensor):
            made[key] = old
        elif old.shape != new.shape or old.dtype != new.dtype:
            found = f"{tuple(old.shape)} of {old.dtype}, here it is {tuple(new.shape)} of {new.dtype}"
            problems.append(Problem(name, f"optimizer state {key} is {found}"))
        else:
            new.copy_(old)
    return problems
