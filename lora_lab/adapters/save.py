"""Adapters on disk, in PEFT's own format: plain `PeftModel.from_pretrained(base, folder)` gives the same model back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from lora_lab.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.record.atomic import read_json, write_json
from lora_lab.record.whole_folder import write_whole_folder


def save_adapter(model: Any, folder: Path, *, name: str = "default") -> int:
    """Writes adapter `name` to `folder`, complete or not at all, and returns the bytes on disk.

    A model without adapters (method=full) is what was trained itself: all its weights are written.

    Raises:
        InputError: the folder is there already, or weights are not finite.
        MachineError: the disk refuses.
    """
    if not isinstance(model, PeftModel):
        return _write_whole(folder, lambda temporary: _save_weights(model, temporary))
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(Problem(str(folder), f"not saved: {len(broken)} of {len(weights)} tensors hold NaN or Inf"))

    def write(temporary: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # An adapter on the embedding is no reason to save the embedding: it has not changed.
            model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
        inner = temporary / name  # where PEFT puts adapters that are not called "default"
        if inner.is_dir():
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                (inner / file).rename(temporary / file)
            inner.rmdir()
        config = read_json(temporary / CONFIG_FILE)
        config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set: another order each time
        write_json(temporary / CONFIG_FILE, config)

    return _write_whole(folder, write)


def save_model(model: Any, tokenizer: Any, folder: Path) -> int:
    """Writes a whole transformers model (safetensors, config, tokenizer), fit for model=folder; like `save_adapter`."""

    def write(temporary: Path) -> None:
        _save_weights(model, temporary)
        tokenizer.save_pretrained(temporary)

    return _write_whole(folder, write)


def load_adapter(base_model: Any, folder: Path, *, name: str = "default") -> PeftModel:
    """`base_model` with the adapter of `folder`, in eval mode and frozen, once the folder has passed every check.

    A PeftModel gets one more adapter, which is not yet active.

    Raises:
        InputError: the folder or its content is refused (`adapters.folder`), or it does not fit the model; the base is
            then left as it was.
    """
    settings, tensors = read_adapter(folder)
    known = {key: value for key, value in settings.items() if key in LoraConfig.__dataclass_fields__}
    config = LoraConfig(**{**known, "inference_mode": True, "init_lora_weights": True})
    is_further = isinstance(base_model, PeftModel)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_further:
                base_model.add_adapter(name, config)
            model = base_model if is_further else PeftModel(base_model, config, adapter_name=name)
    except ValueError as error:
        raise InputError(Problem(str(folder), f"does not fit the model: {error}")) from error
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    problems = _differences(expected, tensors, rank=config.r, hidden_size=model.config.hidden_size)
    if problems:
        if is_further:
            model.delete_adapter(name)
        else:
            model.unload()
        raise InputError([Problem(str(folder / WEIGHTS_FILE), problem) for problem in problems])
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    return model.eval()


def _save_weights(model: Any, folder: Path) -> None:
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def _differences(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], *, rank: int, hidden_size: int
) -> list[str]:
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    problems = []
    if missing:
        matched = len(expected) - len(missing)
        problems.append(f"expected {len(expected)} tensors, matched {matched}; missing: {', '.join(missing[:3])}")
    if unknown:
        problems.append(f"{len(unknown)} tensors the model has no place for: {', '.join(unknown[:3])}")
    wrong = [key for key in expected if key in found and expected[key].shape != found[key].shape]
    if wrong:
        key = wrong[0]
        sizes = f"{key} is {tuple(found[key].shape)}, the model needs {tuple(expected[key].shape)}"
        reason = _mismatch_reason(expected, found, wrong=wrong, rank=rank, hidden_size=hidden_size)
        problems.append(f"{reason}{len(wrong)} tensors of another size: {sizes}")
    return problems


def _mismatch_reason(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    *,
    wrong: list[str],
    rank: int,
    hidden_size: int,
) -> str:
    """The usual reasons in words: another rank than the configuration says, or another base model."""
    for key in (key for key in wrong if key.endswith("lora_A.weight") and found[key].ndim == 2):
        if found[key].shape[0] != rank:
            return f"rank {rank} in {CONFIG_FILE}, but {found[key].shape[0]} in the weights; "
        if expected[key].shape[1] == hidden_size:
            return f"the adapter was made for hidden size {found[key].shape[1]}, the model has {hidden_size}; "
    return ""


def _write_whole(folder: Path, write: Callable[[Path], object]) -> int:
    if folder.exists():
        raise InputError(Problem(str(folder), "exists already and is not overwritten"))
    try:
        write_whole_folder(folder, write)
    except SafetensorError as error:
        raise MachineError(Problem(str(folder), f"cannot be written: {error}")) from error
    return sum(file.stat().st_size for file in folder.iterdir())
