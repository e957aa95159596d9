"""The state of a member between two steps, on disk: from it the training goes on exactly as if it had never stopped.

Kept are: what was trained, the optimizer's states, what the method has learnt (`Course`), the routers' totals of the
interval that is being observed, and the records of the steps so far (from here and not from the step log, which has
neither the times of a cohort's steps nor which number is an auxiliary loss). Rates are those of the schedule at this
step. Data order, dropout masks, Sophia's labels and LISA's draws are pure functions of the step and have no state.

A frozen adapter that is a decomposition of the base (pissa, olora) is kept as well: it is what training started from to
the last bit, which a decomposition computed again need not be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab.adapters.attach import Attached
from lora_lab.adapters.course import CourseState
from lora_lab.adapters.decomposed import start_name
from lora_lab.errors import DataError, InputError, MachineError, Problem, first_line
from lora_lab.optim.states import put_states, settings_of, states_of
from lora_lab.record.checkpoint import read_checkpoint, write_checkpoint
from lora_lab.train import record_columns
from lora_lab.train.member import Member

# The parts of the tensors' file, each before a slash.
_PARTS = ("weights", "optimizer", "course", "routing", "records")
# The same schedule on another machine may differ in the last bit of a cosine.
_SAME_RATE = 1e-9


@dataclass(frozen=True, slots=True)
class _Saved:
    """What a checkpoint says. setting: what a member has to share to go on from it. numbers: states of the optimizer
    that are no tensors, by parameter and name. tensors: by part and name."""

    step: int
    setting: dict[str, Any]
    rates: list[float]
    numbers: dict[str, dict[str, Any]]
    course: dict[str, Any] | None
    tensors: dict[str, dict[str, Tensor]]


def save_state(member: Member, attached: Attached, folder: Path) -> int:
    """Makes the member's state the checkpoint of `folder` in place of an older one; returns its bytes on disk.

    At every moment, also of a kill or a power cut, the folder holds the older checkpoint or this one, complete. It
    belongs between two steps, after all that is logged and observed of the last one.

    Raises:
        ValueError: the member has diverged, or is in the middle of a step.
        MachineError: the disk refuses; the older checkpoint is then still there.
    """
    if member.diverged is not None:
        raise ValueError(f"{member.name} has diverged and does not go on")
    if any(parameter.grad is not None for parameter in member.parameters):
        raise ValueError(f"{member.name} is in the middle of a step")
    names = {parameter: name for name, parameter in attached.trained}
    states = {names[parameter]: state for parameter, state in states_of(member.optimizer).items()}
    course = None if member.course is None else member.course.state(member.step)
    parts: dict[str, Mapping[str, Tensor]] = {
        "weights": _weights(attached, member.step),
        "optimizer": {f"{name}/{key}": one for name, state in states.items() for key, one in _tensors(state).items()},
        "course": {} if course is None else course.tensors,
        "routing": {} if attached.routing is None else attached.routing.sums,
        "records": record_columns.columns_of(member.records),
    }
    tensors = {f"{part}/{name}": _plain(one) for part in _PARTS for name, one in parts[part].items()}
    state = {
        "step": member.step,
        "setting": _setting(member, attached),
        "rates": [group["lr"] for group in member.optimizer.param_groups],
        "optimizer": {name: _numbers(state) for name, state in states.items()},
        "course": None if course is None else course.values,
    }
    return write_checkpoint(folder, state, lambda path: _write_tensors(tensors, path))


def load_state(member: Member, attached: Attached, folder: Path) -> None:
    """Makes a member that has not begun the one that was saved in `folder`: its next step is that of the saved one.

    All is checked before anything is changed.

    Raises:
        InputError: with every problem: no checkpoint, a damaged one, or one of another training. The member and its
            model are then as they were, and may begin at the first step.
        MachineError: it cannot be read.
        ValueError: the member has begun.
    """
    if member.step or member.records or member.optimizer.state:
        raise ValueError(f"{member.name} has begun")
    saved = _read(folder)
    weights = _weights(attached, saved.step)
    problems = [*_setting_problems(saved, member, attached), *_weight_problems(saved.tensors["weights"], weights)]
    problems += record_columns.misfits(saved.tensors["records"])
    problems += _routing_problems(saved.tensors["routing"], attached)
    course = CourseState(saved.tensors["course"], saved.course or {})
    if member.course is not None and saved.course is not None:
        problems += member.course.misfits(saved.step, course)
    if problems:
        raise InputError([Problem(str(folder), problem) for problem in problems])
    _put_optimizer(saved, member, attached, folder)
    with torch.no_grad():
        for name, tensor in saved.tensors["weights"].items():
            weights[name].copy_(tensor)
    if member.course is not None:
        member.course.take_up(saved.step, course, member.optimizer)
    _set_schedule(member, saved.step)
    if attached.routing is not None:
        attached.routing.put_back(saved.tensors["routing"], device=member.parameters[0].device)
    member.records = record_columns.records_of(saved.tensors["records"])
    member.step = saved.step


def _weights(attached: Attached, step: int) -> dict[str, Tensor]:
    """By name, all that may differ after `step` steps from what attaching once more would make."""
    trained = dict(attached.trained)
    found: dict[str, Tensor] = {name: trained[name] for name in attached.changed_after(step)}
    adapters = getattr(attached.model, "peft_config", {})
    for start in [start_name(name) for name in adapters if start_name(name) in adapters]:
        found |= {name: one for name, one in attached.model.named_parameters() if f".{start}." in f"{name}."}
    return found


def _setting(member: Member, attached: Attached) -> dict[str, Any]:
    """What the saved and the loading member have to share, as JSON gives it back."""
    setting = {
        "optimizer": settings_of(member.optimizer),
        "device": member.parameters[0].device.type,
        "dropout seed": None if member.dropout_clock is None else member.dropout_clock.seed,
        "course": None if member.course is None else type(member.course).__name__,
        "routers": attached.routing is not None,
    }
    found: dict[str, Any] = json.loads(json.dumps(setting))
    return found


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise MachineError(Problem(str(path), f"cannot be written: {first_line(error)}")) from error


def _read(folder: Path) -> _Saved:
    state, path = read_checkpoint(folder)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    try:
        for key, tensor in load_file(path).items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        return _Saved(
            step=state["step"],
            setting=state["setting"],
            rates=state["rates"],
            numbers=state["optimizer"],
            course=state["course"],
            tensors=parts,
        )
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(Problem(str(path), f"is not a state of a training: {first_line(error)}")) from error


def _setting_problems(saved: _Saved, member: Member, attached: Attached) -> list[str]:
    own = _setting(member, attached)
    problems = [
        f"{key} {saved.setting.get(key)}, here it is {own[key]}" for key in own if saved.setting.get(key) != own[key]
    ]
    rates = _rates(member, saved.step)
    is_same = len(rates) == len(saved.rates) and all(map(_is_close, rates, saved.rates))
    if not is_same:
        problems.append(f"learning rates after {saved.step} steps {saved.rates}, here they are {rates}")
    if saved.step > member.total_steps:
        problems.append(f"{saved.step} steps, this training has {member.total_steps}")
    return problems


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME_RATE)


def _rates(member: Member, step: int) -> list[float]:
    """Of each group at step `step` (from 0), by the arithmetic of LambdaLR."""
    schedule = member.schedule
    return [float(rate) * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]


def _set_schedule(member: Member, step: int) -> None:
    rates = _rates(member, step)
    functions = [None] * len(rates)
    member.schedule.load_state_dict(
        {"lr_lambdas": functions, "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    )
    for group, rate in zip(member.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _weight_problems(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for what, names in (("missing", own.keys() - saved.keys()), ("of no place here", saved.keys() - own.keys())):
        if names:
            problems.append(f"{len(names)} weights are {what}: {', '.join(sorted(names)[:3])}")
    for name in sorted(own.keys() & saved.keys()):
        if (saved[name].shape, saved[name].dtype) != (own[name].shape, own[name].dtype):
            found = f"{tuple(saved[name].shape)} of {saved[name].dtype}"
            problems.append(f"{name} is {found}, here it is {tuple(own[name].shape)} of {own[name].dtype}")
    return problems


def _routing_problems(saved: Mapping[str, Tensor], attached: Attached) -> list[str]:
    routers = {getattr(module, "routing_name", None) for module in attached.model.modules()}
    unknown = sorted(set(saved) - routers)
    return [f"{len(unknown)} routers are of no place here: {', '.join(unknown[:3])}"] if unknown else []


def _put_optimizer(saved: _Saved, member: Member, attached: Attached, folder: Path) -> None:
    parameters: dict[str, nn.Parameter] = dict(attached.trained)
    states: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in saved.numbers.items()}
    for key, tensor in saved.tensors["optimizer"].items():
        name, _, entry = key.rpartition("/")
        states[name][entry] = tensor
    if unknown := sorted(states.keys() - parameters.keys()):
        raise InputError(Problem(str(folder), f"states of {len(unknown)} parameters of no place here: {unknown[:3]}"))
    names = {parameter: name for name, parameter in parameters.items()}
    try:
        put_states(member.optimizer, {parameters[name]: state for name, state in states.items()}, names)
    except InputError as error:
        raise InputError([Problem(str(folder), str(problem)) for problem in error.problems]) from None
