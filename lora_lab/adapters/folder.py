"""What an adapter folder must look like before PEFT sees it: a known kind and settings, finite safetensors weights.

PEFT would load much more: pickles, regular expressions as target modules, configurations that import modules or name
what is to be downloaded, adapters with missing or NaN weights. Each is refused here with its reason, or not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_lab.adapters.accepted import ACCEPTED, setting_problems
from lora_lab.errors import InputError, Problem, nearest
from lora_lab.record.whole_folder import looks_like

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_CONFIG_LIMIT_BYTES = 1_000_000


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the weights (on the CPU) of an adapter folder.

    Raises:
        InputError: with every problem found.
    """
    if not folder.is_dir():
        raise InputError(Problem(str(folder), "no such folder"))
    problems = _file_problems(folder)
    config: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    if not any(problem.where.endswith(CONFIG_FILE) for problem in problems):
        config, found = _config(folder / CONFIG_FILE)
        problems += found
    if not any(problem.where.endswith(WEIGHTS_FILE) for problem in problems):
        tensors, found = _weights(folder / WEIGHTS_FILE)
        problems += found
    if problems:
        raise InputError(problems)
    return config, tensors


def _file_problems(folder: Path) -> list[Problem]:
    problems = []
    if not (folder / CONFIG_FILE).is_file():
        problems.append(Problem(str(folder / CONFIG_FILE), "not found"))
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = [name for name in _PICKLES if (folder / name).exists()]
        rule = f"; {pickled[0]} is there, but pickled adapters can run code and are not accepted" if pickled else ""
        problems.append(Problem(str(folder / WEIGHTS_FILE), f"not found{rule}"))
    return problems


def _config(file: Path) -> tuple[dict[str, Any], list[Problem]]:
    if file.stat().st_size > _CONFIG_LIMIT_BYTES:
        return {}, [Problem(str(file), f"larger than {_CONFIG_LIMIT_BYTES} bytes")]
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, [Problem(str(file), f"not valid JSON: {error}")]
    if not isinstance(config, dict):
        return {}, [Problem(str(file), f"expected a JSON object, got {type(config).__name__}")]
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in ACCEPTED:
        known = [entry.value for entry in PeftType]
        reason = f"not supported here, only {', '.join(ACCEPTED)}" if kind in known else "no such type"
        hint = "" if kind in known else nearest(str(kind), list(ACCEPTED))
        return {}, [Problem(f"{file}: peft_type", f"{json.dumps(kind)}: {reason}{hint}")]
    return config, [Problem(f"{file}: {key}", message) for key, message in setting_problems(ACCEPTED[kind], config)]


def _weights(file: Path) -> tuple[dict[str, torch.Tensor], list[Problem]]:
    try:
        repeated = _repeated_names(file)
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        return {}, [Problem(str(file), f"not a safetensors file: {looks_like(file) or error}")]
    if repeated:
        return {}, [Problem(str(file), f"holds {repeated[0]} twice")]
    if not tensors:
        return {}, [Problem(str(file), "holds no tensors")]
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        return {}, [Problem(str(file), f"{len(broken)} of {len(tensors)} tensors hold NaN or Inf: {_some(broken)}")]
    return tensors, []


def _repeated_names(file: Path) -> list[str]:
    """safetensors itself lets the last of two tensors with one name win."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            return []  # safetensors says it better
        header = opened.read(length)
    names: list[str] = []
    json.loads(header, object_pairs_hook=lambda pairs: names.extend(key for key, _ in pairs))
    tensor_names = [name for name in names if name not in ("dtype", "shape", "data_offsets", "format", "__metadata__")]
    return sorted({name for name in tensor_names if tensor_names.count(name) > 1})


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
