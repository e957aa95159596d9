"""What the doctor asks of libraries, in a process of their own (see `app.questions`): imported, tried, told as facts.

Every function answers `{"fact": text, "concern": text or null}`; a concern says why the fact is not all right. What
cannot be imported or fails is an exception, which the process reports.
"""

from __future__ import annotations

import importlib
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from lora_lab.errors import MachineError, Problem
from lora_lab.record.environment import cpu_model
from lora_lab.report.text import bytes_text

_LAB = "lora-lab"
# Of a product of Gaussian matrices: 4-bit weights give about 0.1, anything broken is near 1 or not a number.
_LARGEST_RELATIVE_ERROR = 0.3
_SIDE = 64
_EIGHT_BIT_FROM = 4096  # a smaller tensor keeps its optimizer state in 32 bits

Fact = dict[str, Any]


def library(distribution: str, modules: list[str]) -> Fact:
    """The version, once all `modules` have been imported; a version that the lab does not ask for is a concern.

    Raises:
        MachineError: not installed.
    """
    installed = _installed(distribution)
    for module in modules:
        importlib.import_module(module)
    return {"fact": installed, "concern": _version_concern(distribution, installed)}


def imported(modules: list[str]) -> Fact:
    """The lab's own modules that a run needs, with everything that they import."""
    for module in modules:
        importlib.import_module(module)
    return {"fact": "everything that a run imports is there", "concern": None}


def torch_build() -> Fact:
    """The version of torch and what it was built for."""
    import torch

    built_for = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = ", ".join(f"built for {name} {version}" for name, version in built_for.items() if version)
    fact = f"{torch.__version__}, {build or 'built for CPUs only'}"
    return {"fact": fact, "concern": _version_concern("torch", torch.__version__)}


def devices() -> Fact:
    """Every GPU with its memory, or the processor with its cores and memory; and whether bf16 is native."""
    import torch

    if torch.cuda.is_available():
        return {"fact": "; ".join(_gpu(index) for index in range(torch.cuda.device_count())), "concern": None}
    memory = psutil.virtual_memory()
    fact = (
        f"{cpu_model()}, {psutil.cpu_count(logical=True)} cores (torch uses {torch.get_num_threads()}), "
        f"{bytes_text(memory.total)} memory ({bytes_text(memory.available)} free), {_cpu_bf16()}"
    )
    if torch.version.cuda or torch.version.hip:
        return {"fact": fact, "concern": "torch is built for GPUs and sees none; look at CUDA_VISIBLE_DEVICES"}
    if shutil.which("nvidia-smi"):
        return {"fact": fact, "concern": "an NVIDIA driver is installed, but torch is built for CPUs only"}
    return {"fact": fact, "concern": None}


def bitsandbytes() -> Fact:
    """The version, once a 4-bit layer has multiplied and an 8-bit optimizer has stepped where runs would.

    Raises:
        MachineError: not installed, or a result is wrong.
    """
    installed = _installed("bitsandbytes")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = {kind: _four_bit_error(kind, device) for kind in ("nf4", "fp4")}
    wrong = [
        f"{kind}: relative error {error:.2g}" for kind, error in errors.items() if not error < _LARGEST_RELATIVE_ERROR
    ]
    if wrong:
        raise MachineError(Problem("", f"{installed} gives wrong 4-bit products on {device} ({', '.join(wrong)})"))
    _step_in_eight_bits(device)
    tried = ", ".join(f"{kind} {error:.2f}" for kind, error in errors.items())
    fact = f"{installed}; a 4-bit product and an 8-bit step work on {device} (relative error {tried})"
    return {"fact": fact, "concern": _version_concern("bitsandbytes", installed)}


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise MachineError("not installed") from None


def _version_concern(distribution: str, installed: str) -> str | None:
    """What the lab asks for, where the installed version is another; None also where the lab is not installed."""
    try:
        asked = [Requirement(text) for text in metadata.requires(_LAB) or ()]
    except metadata.PackageNotFoundError:
        return None
    for one in asked:
        if _same_name(one.name, distribution) and not one.specifier.contains(installed, prereleases=True):
            return f"lora-lab needs {distribution}{one.specifier}"
    return None


def _same_name(one: str, other: str) -> bool:
    return one.lower().replace("_", "-") == other.lower().replace("_", "-")


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        free, total = torch.cuda.mem_get_info()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = "bf16" if native else "no bf16"
    return f"cuda:{index} {properties.name}, {bytes_text(total)} memory ({bytes_text(free)} free), {bf16}"


def _cpu_bf16() -> str:
    """bf16 works on every CPU; only some have instructions for it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "bf16 instructions not known"
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    own = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return f"bf16 by {', '.join(own)}" if own else "bf16 without instructions of its own (slow)"


def _four_bit_error(kind: str, device: str) -> float:
    """Relative error of a product with 4-bit weights; about 0.1."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, _SIDE, generator=generator) for rows in (_SIDE, 3))
    layer = Linear4bit(_SIDE, _SIDE, bias=False, compute_dtype=torch.float32, quant_type=kind)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
    with torch.no_grad():
        found = layer.to(device)(inputs.to(device)).cpu()
    exact = inputs @ weight.T
    return float((found - exact).norm() / exact.norm())


def _step_in_eight_bits(device: str) -> None:
    import torch
    from bitsandbytes.optim import AdamW8bit

    parameter = torch.nn.Parameter(torch.zeros(_EIGHT_BIT_FROM, device=device))
    parameter.grad = torch.ones_like(parameter)
    AdamW8bit([parameter], lr=1e-3).step()
    moved = float(parameter.detach().abs().max())
    if not 0 < moved < 1:
        raise MachineError(Problem("", f"an 8-bit optimizer step of 0.001 moved a weight by {moved:g} on {device}"))
