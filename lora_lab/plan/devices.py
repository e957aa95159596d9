"""Memory of the devices that a plan can be made for: cards by name, or any size.

total_bytes is what PyTorch reports ("GPU 0 has a total capacity of 79.15 GiB"), to the 0.01 GiB that are printed: less
than what a card is sold with, and a little different from driver to driver and with error correction on or off.
context_bytes is what a process holds beyond PyTorch's allocator: CUDA's context with the kernels loaded so far, and
what libraries allocate themselves. It is read off the same message, which says what the driver counts for the process
and what the allocator holds of it (since pytorch/pytorch#99699). It is typical and was not measured here; it grows with
the kernels in use, and much further where several devices talk to each other (NCCL).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_lab.errors import InputError, Problem, nearest

_GIB = 2**30
# cuBLAS's workspace on most cards; see `workspace_bytes`.
WORKSPACE_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
_SIZE = re.compile(r"(\d{1,5}(?:\.\d{1,3})?) ?(gib|gb)")
_UNITS = {"gib": _GIB, "gb": 10**9}


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory. context_bytes: what the allocator cannot have. source: where both numbers come from."""

    name: str
    total_bytes: int
    context_bytes: int
    source: str


def device_memory(text: str) -> DeviceMemory:
    """A card by its name in `DEVICES`, or a size such as 24GiB (2^30 bytes) or 24GB (10^9); case does not matter.

    Raises:
        InputError: neither of the two.
    """
    name = text.strip().lower()
    if name in DEVICES:
        return DEVICES[name]
    size = _SIZE.fullmatch(name)
    if size is None:
        choices = [card for card in DEVICES if card.startswith(name)] or list(DEVICES)
        rule = f'no such device "{text[:100]}"{nearest(name, choices)}, or a size such as 24GiB or 24GB'
        raise InputError(Problem("device", rule))
    total_bytes = round(float(size[1]) * _UNITS[size[2]])
    if total_bytes <= _OF_ANY_CARD:
        rule = f"must be more than the {_OF_ANY_CARD / _GIB:.2f} GiB of CUDA's context, got {text.strip()}"
        raise InputError(Problem("device", rule))
    return DeviceMemory(text.strip(), total_bytes, _OF_ANY_CARD, "the size that was asked for; context: as of a100")


def workspace_bytes(device: DeviceMemory) -> int:
    """What cuBLAS is given to work in: by PyTorch, through its allocator, so that it counts as allocated.

    32 MiB on Hopper and Blackwell, else :4096:2:16:8, which is 2 of 4 MiB and 8 of 16 KiB; a size could be any card, so
    it is given the larger. PyTorch allocates it when a handle is first used, once per handle and stream, and keeps it.
    A thread has a handle of its own: there are two once a training has gone backwards, one of the main thread and one
    of the thread in which autograd runs. cuBLASLt uses the same buffer (TORCH_CUBLASLT_UNIFIED_WORKSPACE, on by
    default). Sources: `parseChosenWorkspaceSize` in aten/src/ATen/cuda/CublasHandlePool.cpp, `blas_workspace_size` in
    torch/backends/cuda/__init__.py, the notes on CUDA semantics (cuBLAS workspaces), all of PyTorch 2.13.
    """
    is_older = device.name in DEVICES and device.name not in _LARGE_WORKSPACE
    return WORKSPACE_BYTES if is_older else _LARGER_WORKSPACE


def _card(name: str, total_gib: float, context_gib: float, source: str) -> DeviceMemory:
    return DeviceMemory(name, round(total_gib * _GIB), round(context_gib * _GIB), source)


# owner/repository#number is an issue on GitHub; numbers in brackets are GiB of its message. Where none was found that
# tells a card's context, that of another card is taken: of the same chip, or a larger one.
_CARDS = (
    _card("b200", 178.35, 0.70, "both: stas00/ml-engineering, debug/pytorch.md (168.34 in use, 167.64 allocated)"),
    _card("h200", 139.80, 0.52, "both: stas00/ml-engineering, debug/pytorch.md (139 of 1 GiB allocated, 0.28 free)"),
    _card("h100", 79.11, 0.52, "vllm-project/vllm#27508; context: as of h200, the same chip"),
    _card(
        "a100", 79.15, 0.49, "EricFillion/happy-transformer#333; context: lianqi1008/Control-GIC#6 (9.25 - 8.27 - 0.49)"
    ),
    _card(
        "a100-40", 39.39, 0.49, "philschmid/llm-sagemaker-sample#25; context: TianheWu/CoSeR#10 (14.25 - 12.87 - 0.89)"
    ),
    _card("5090", 31.36, 0.60, "both: TrajectoryCrafter/TrajectoryCrafter#20 (26.89 - 25.95 - 0.34)"),
    _card("4090", 23.64, 0.49, "ali-vilab/VGen#104; context: 3DTopia/Phidias-Diffusion#8 (14.56 - 13.86 - 0.21)"),
    _card("3090", 23.70, 0.26, "Lightning-AI/lit-llama#137; context: as of a6000, the same chip"),
    _card("a6000", 47.53, 0.26, "both: black-forest-labs/flux2#23 (47.35 - 47.08 - 0.01)"),
    _card("l40", 44.40, 0.50, "both: QwenLM/Qwen3-VL#2097 (11.13 - 10.25 - 0.39)"),
    _card("l40s", 44.53, 0.50, "vllm-project/vllm#15598; context: as of l40, the same chip"),
    _card("l4", 22.03, 0.26, "messages in public repositories that name an L4; context: as of a6000"),
    _card("a10", 21.99, 0.22, "both: zai-org/CogVLM#236 (21.91 - 21.69)"),
    _card("a10g", 21.99, 0.22, "mistralai/mistral-finetune#69; context: as of a10, the same chip"),
    _card("t4", 14.56, 0.13, "both: Zheng-Chong/CatVTON#133 (4.11 - 3.72 - 0.26)"),
    _card("v100-32", 31.74, 0.49, "liucongg/ChatGLM-Finetuning#73; context: as of a100"),
    _card("v100-16", 15.77, 0.49, "nomic-ai/gpt4all#544; context: as of a100"),
)
DEVICES: Mapping[str, DeviceMemory] = {card.name: card for card in _CARDS}

_OF_ANY_CARD = DEVICES["a100"].context_bytes
_LARGER_WORKSPACE = 32 * 2**20
_LARGE_WORKSPACE = ("b200", "h200", "h100", "5090")
