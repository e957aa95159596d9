"""What a model folder must look like before transformers sees it: plain safetensors weights, no code, all there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_lab.errors import InputError, Problem
from lora_lab.plan.folder import check_config, read_config
from lora_lab.record.whole_folder import looks_like

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX = "model.safetensors.index.json"
_CHAT_TEMPLATE_LIMIT_BYTES = 200_000


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The content of config.json, once nothing speaks against loading the folder.

    Raises:
        InputError: with every problem: missing or unreadable config.json, keys that lead to code, weights that are
            missing, pickled, cut off or only a pointer, weights that are quantized already, no tokenizer.
    """
    config = read_config(folder, where="model.path")
    problems = [*_quantized_already(folder, config), *_weight_problems(folder), *_tokenizer_problems(folder)]
    if problems:
        raise InputError(problems)
    return config


def _quantized_already(folder: Path, config: dict[str, Any]) -> list[Problem]:
    if "quantization_config" not in config:
        return []
    rule = "the weights are quantized already; give the plain model and choose quantization=nf4 or fp4"
    return [Problem(f"{folder / 'config.json'}: quantization_config", rule)]


def _weight_problems(folder: Path) -> list[Problem]:
    index = folder / _INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return [Problem(str(index), looks_like(index) or "expected JSON with a weight_map of shard files")]
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            return [Problem(str(index), f"shards must lie in the same folder, got {outside[0]!r}")]
        files = [folder / name for name in shards]
    else:
        files = [folder / "model.safetensors"]
    if not any(file.is_file() for file in files):
        return [_no_weights(folder)]
    return [problem for file in files for problem in _shard_problems(file)]


def _no_weights(folder: Path) -> Problem:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return Problem(
            str(folder),
            f"holds only pickled weights ({pickles[0]}), which can run code and are not accepted; "
            "convert them to safetensors where you trust them",
        )
    return Problem(str(folder), "model.safetensors not found")


def _shard_problems(file: Path) -> list[Problem]:
    if not file.is_file():
        return [Problem(str(file), "not found, but the index names it")]
    try:
        with safe_open(file, framework="pt") as tensors:
            if not tensors.keys():
                return [Problem(str(file), "holds no tensors")]
    except (SafetensorError, OSError) as error:
        return [Problem(str(file), f"not a safetensors file: {looks_like(file) or error}")]
    return []


def _tokenizer_problems(folder: Path) -> list[Problem]:
    problems = []
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        problems.append(Problem(str(folder), f"no tokenizer (one of {', '.join(_TOKENIZER_FILES)})"))
    problems += [Problem(str(file), looks) for file in found if (looks := looks_like(file))]
    template = folder / "chat_template.jinja"
    if template.is_file() and template.stat().st_size > _CHAT_TEMPLATE_LIMIT_BYTES:
        problems.append(Problem(str(template), f"larger than {_CHAT_TEMPLATE_LIMIT_BYTES} bytes"))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        try:
            check_config(json.loads(settings.read_text(encoding="utf-8")), str(settings))
        except InputError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(Problem(str(settings), looks_like(settings) or f"not valid JSON: {error}"))
    return problems
