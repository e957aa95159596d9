"""Memory of a phase, by what the device can tell: CUDA's allocator, or the process's resident set."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from lora_lab.memory.malloc import give_back

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class MemoryMeter:
    """Peaks of named phases, in bytes, under `<phase>_peak_*_bytes`; what cannot be told apart is in `missing`.

    Of a phase that is entered several times it is the largest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.measurements: dict[str, int] = {}
        self.missing: dict[str, str] = {}

    @contextlib.contextmanager
    def phase(self, name: str, *, is_short: bool = False) -> Iterator[None]:
        """Resets the peaks, runs the block, records them (also when the block raises: a failed run has peaks too).

        Memory that earlier work has freed is given back first, unless the phase is too short for that to pay.
        """
        if not is_short:
            give_back()
        is_reset = _reset_resident_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self._record(name, is_reset=is_reset)

    def _record(self, name: str, *, is_reset: bool) -> None:
        if self._device.type == "cuda":
            self._keep(f"{name}_peak_allocated_bytes", torch.cuda.max_memory_allocated(self._device))
            self._keep(f"{name}_peak_reserved_bytes", torch.cuda.max_memory_reserved(self._device))
        else:
            self.missing[f"{name}_peak_reserved_bytes"] = "only CUDA's allocator reserves memory"
        if is_reset:
            self._keep(f"{name}_peak_rss_bytes", _resident_peak())
        else:
            self.missing[f"{name}_peak_rss_bytes"] = "this system keeps one peak for the whole process"

    def _keep(self, name: str, peak: int) -> None:
        self.measurements[name] = max(peak, self.measurements.get(name, 0))


class Unmeasured:
    """Stands where a meter would, of who shares its memory with others: nothing is measured, and `why` is said."""

    def __init__(self, why: str) -> None:
        self._why = why
        self.measurements: dict[str, int] = {}
        self.missing: dict[str, str] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Runs the block."""
        kinds = ("allocated", "reserved", "rss")
        self.missing |= {f"{name}_peak_{kind}_bytes": self._why for kind in kinds}
        yield


def memory_now(device: torch.device) -> dict[str, int]:
    """What the device can tell at this moment: allocated and reserved bytes on CUDA, else the resident set."""
    if device.type == "cuda":
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
        }
    return {"rss_bytes": int(psutil.Process().memory_info().rss)}


def process_peak_bytes() -> int:
    """Largest resident set of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_resident_peak() -> bool:
    """Linux can forget the peak so far; returns whether it did."""
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return process_peak_bytes()
