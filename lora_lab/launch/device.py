"""The devices that run, and what the record says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_lab.errors import InputError, MachineError, Problem


def choose_devices(names: str | Sequence[str]) -> tuple[torch.device, ...]:
    """The devices that get a process each. `auto` is every CUDA device there is, else the CPU.

    Raises:
        InputError, MachineError: as `choose_device`, for the first name that is wrong.
    """
    if names == "auto" and torch.cuda.device_count() > 1:
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return tuple(map(choose_device, [names] if isinstance(names, str) else names))


def choose_device(name: str) -> torch.device:
    """One device: `auto` is CUDA where there is one.

    Raises:
        InputError: for a name that is no device.
        MachineError: for a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(Problem("launch.device", f'expected auto, cpu, cuda or cuda:N, got "{name}"')) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            Problem("launch.device", f"{name}: {torch.cuda.device_count()} CUDA devices here; use launch.device=cpu")
        )
    return device


def gpu_facts(device: torch.device) -> dict[str, Any] | None:
    """Name and memory of the GPU that will run, for the record; None on a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {"names": [properties.name], "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
