"""What an adapter folder must look like before PEFT sees it: a LoRA of known settings, finite safetensors weights.

PEFT would load much more: pickles, regular expressions as target modules, configurations that import modules, adapters
with missing or NaN weights. Each is refused here with its reason.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.record.whole_folder import looks_like

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_CONFIG_LIMIT_BYTES = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
# Written by PEFT into every configuration, not a field of the class.
_EXTRA_KEYS = ("peft_version", "loaded_in_4bit", "loaded_in_8bit")
# Initialisations that change the base: the weights alone would not give the adapter back.
_PLAIN_INITS = (True, False, "gaussian")


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
    if kind != PeftType.LORA:
        known = [entry.value for entry in PeftType]
        message = "not supported here, only LORA" if kind in known else "no such type" + nearest(str(kind), known)
        return {}, [Problem(f"{file}: peft_type", f"{json.dumps(kind)}: {message}")]
    return config, [Problem(f"{file}: {key}", message) for key, message in _setting_problems(config)]


def _setting_problems(config: dict[str, Any]) -> list[tuple[str, str]]:
    known = {field.name for field in fields(LoraConfig)} | set(_EXTRA_KEYS)
    # Other versions of PEFT know other settings; one that is off changes nothing.
    problems = [(key, "unknown setting") for key, value in config.items() if value and key not in known]
    problems += [(key, "it can make PEFT import code; refused") for key in ("auto_mapping",) if config.get(key)]
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        problems.append(("megatron_core", "it can make PEFT import code; refused"))
    if not _is_count(config.get("r")):
        problems.append(("r", f"expected an integer >= 1, got {config.get('r')!r}"))
    alpha = config.get("lora_alpha")
    if not _is_positive(alpha):
        problems.append(("lora_alpha", f"expected a finite number > 0, got {alpha!r}"))
    if not _all_names(config.get("target_modules")):
        problems.append(("target_modules", "expected a list of module names (regular expressions are not accepted)"))
    for key in ("rank_pattern", "alpha_pattern"):
        if not _all_names(list(config.get(key) or {"none": 0})):
            problems.append((key, "expected module names as keys (regular expressions are not accepted)"))
    for key in ("exclude_modules", "layers_pattern", "layers_to_transform", "target_parameters", "layer_replication"):
        if config.get(key):
            problems.append((key, "not supported"))
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        rule = "changes the base weights, so the adapter's file alone does not say what was trained"
        problems.append(("init_lora_weights", f"{config.get('init_lora_weights')!r} {rule}"))
    return problems


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _all_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) and _NAME.fullmatch(x) for x in value)


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
