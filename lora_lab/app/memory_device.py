"""Whose memory predictions are compared with: a device that was named, or the one that the runs will have. torch only
where this machine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from lora_lab.app.own_flags import DEVICE, OwnFlags
from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.plan.devices import DeviceMemory, device_memory
from lora_lab.plan.prediction import DeviceKind
from lora_lab.record.environment import environment
from lora_lab.schema.trial import Lab

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Against:
    """kind: how its bytes are counted; everything that is named is a CUDA device."""

    device: DeviceMemory
    kind: DeviceKind


def named_device(text: str, *, where: str) -> Against:
    """A device by its name or size. where: the flag or key that holds the text.

    Raises:
        InputError: no such name, and no size.
    """
    try:
        return Against(device_memory(text), "cuda")
    except InputError as error:
        raise InputError([Problem(where, problem.message) for problem in error.problems]) from None


def device_problems(own: OwnFlags) -> list[Problem]:
    """What is wrong with the value of `--device`."""
    try:
        if own.device is not None:
            named_device(own.device, where=DEVICE)
    except InputError as error:
        return list(error.problems)
    return []


def whole_device(lab: Lab) -> Against:
    """All the memory of the device that a run of `lab` would have: the smallest, where there are several.

    Raises:
        MachineError: a device of `launch.device` is not on this machine.
    """
    import torch

    first, several = _own_devices(lab)
    if first.type == "cpu":
        return _cpu(psutil.virtual_memory().total, "all memory of this machine")
    found = [torch.cuda.get_device_properties(one) for one in several if one.type == "cuda"]
    smallest = min(found, key=lambda one: one.total_memory)
    total = int(smallest.total_memory)
    alike = device_memory(f"{total / 2**30:.3f}GiB")
    return Against(DeviceMemory(smallest.name, total, alike.context_bytes, f"this machine; {alike.source}"), "cuda")


def free_device(lab: Lab, *, runs: int) -> Against:
    """What a run may take right now on the device that it will have. runs: how many wait.

    Of several CUDA devices it is all their memory: asking what is free would begin a context on each of them.

    Raises:
        MachineError: as `whole_device`.
    """
    import torch

    first, several = _own_devices(lab)
    if first.type == "cpu":
        sharers = min(sum(one.type == "cpu" for one in several), max(runs, 1))
        among = "" if sharers == 1 else f", among {sharers} workers"
        return _cpu(psutil.virtual_memory().available // sharers, f"free on this machine now{among}")
    if len(several) > 1:
        return whole_device(lab)
    free, _ = torch.cuda.mem_get_info(first)
    # The context of this process is there by now, and not in what is free.
    name = torch.cuda.get_device_properties(first).name
    return Against(DeviceMemory(name, int(free), 0, "free on this machine now"), "cuda")


def own_machine_id(lab: Lab) -> str:
    """As the environment of a run of `lab` would be recorded; raises as `whole_device`."""
    from lora_lab.launch.device import gpu_facts

    first, _ = _own_devices(lab)
    return str(environment(gpu_facts(first))["machine_id"])


def _own_devices(lab: Lab) -> tuple[torch.device, Sequence[torch.device]]:
    from lora_lab.launch.device import choose_devices

    try:
        devices = choose_devices(lab.launch.device)
    except MachineError as error:
        hint = "; or name the device that is meant: --device h100, memory.device=h100"
        raise MachineError([Problem(one.where, one.message + hint) for one in error.problems]) from None
    return devices[0], devices


def _cpu(size: int, source: str) -> Against:
    return Against(DeviceMemory("this machine", int(size), 0, source), "cpu")
