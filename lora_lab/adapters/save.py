"""Adapters on disk, in PEFT's own format: plain `PeftModel.from_pretrained(base, folder)` gives the same model back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lora_lab.adapters.accepted import ACCEPTED
from lora_lab.adapters.decomposed import as_plain_lora, start_name
from lora_lab.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from lora_lab.adapters.prompts import match_precision
from lora_lab.adapters.pruned_ranks import cut_layers, pruned_state
from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.record.atomic import read_json, write_json
from lora_lab.record.whole_folder import write_whole_folder

# Settings that PEFT keeps as sets and would write in another order each time.
_UNORDERED = ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules")


def save_adapter(model: Any, folder: Path, *, name: str = "default") -> int:
    """Writes adapter `name` to `folder`, complete or not at all, and returns the bytes on disk.

    Of p-tuning and a projected prefix the computed virtual tokens are written, not the encoder that made them (PEFT's
    format), and a pissa or olora as the plain LoRA that it is with its start. A model without adapters (method=full) is
    what was trained itself: all its weights are written.

    Raises:
        InputError: the folder is there already, or weights are not finite.
        MachineError: the disk refuses.
    """
    if not isinstance(model, PeftModel):
        return _write_whole(folder, lambda temporary: _save_weights(model, temporary))
    config, weights = _as_on_disk(model, name)
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(Problem(str(folder), f"not saved: {len(broken)} of {len(weights)} tensors hold NaN or Inf"))

    def write(temporary: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.create_or_update_model_card(str(temporary))
        config.save_pretrained(str(temporary))
        settings = read_json(temporary / CONFIG_FILE)
        unordered = {key: sorted(settings[key]) for key in _UNORDERED if isinstance(settings.get(key), list)}
        write_json(temporary / CONFIG_FILE, settings | unordered)
        save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})

    return _write_whole(folder, write)


def _as_on_disk(model: PeftModel, name: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Configuration and tensors as the files hold them, no tensor sharing its memory with another."""
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config.peft_type == PeftType.ADALORA:
            weights, config.rank_pattern = pruned_state(model, name)
        else:
            # An adapter on the embedding is no reason to save the embedding: it has not changed.
            weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            if (beside := start_name(name)) in model.peft_config:
                start = get_peft_model_state_dict(model, adapter_name=beside, save_embedding_layers=False)
                config, weights = as_plain_lora(config, weights, start)
    return config, {
        key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in weights.items()
    }


def save_model(model: Any, tokenizer: Any, folder: Path) -> int:
    """Writes a whole transformers model (safetensors, config, tokenizer), fit for model=folder; like `save_adapter`."""

    def write(temporary: Path) -> None:
        _save_weights(model, temporary)
        tokenizer.save_pretrained(temporary)

    return _write_whole(folder, write)


def load_adapter(base_model: Any, folder: Path, *, name: str = "default") -> PeftModel:
    """`base_model` with the adapter of `folder`, in eval mode and frozen, once the folder has passed every check.

    A PeftModel gets one more adapter of its own kind, which is not yet active; what it trains stays as it is.

    Raises:
        InputError: the folder or its content is refused (`adapters.folder`), or it does not fit the model; the model is
            then left as it was.
    """
    settings, tensors = read_adapter(folder)
    if isinstance(base_model, PeftModel):
        _check_company(base_model, settings["peft_type"], name, folder)
    before = _Before(base_model)
    try:
        model = _with_place_for(base_model, settings, name)
        if problems := _differences(model, name, settings, tensors):
            raise InputError([Problem(str(folder / WEIGHTS_FILE), problem) for problem in problems])
    except (ValueError, TypeError, NotImplementedError, InputError) as error:
        before.restore(name)
        if isinstance(error, InputError):
            raise
        raise InputError(Problem(str(folder), f"does not fit the model: {error}")) from error
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    if settings["peft_type"] == PeftType.ADALORA:
        model.peft_config[name].rank_pattern = settings.get("rank_pattern")
    before.freeze_the_rest(model)
    return model.eval()


def load_adapter_weights(model: PeftModel, folder: Path, *, name: str = "default") -> None:
    """Gives adapter `name` of `model` the weights of `folder`, to go on with; raises InputError as `load_adapter`."""
    settings, tensors = read_adapter(folder)
    if problems := _differences(model, name, settings, tensors):
        raise InputError([Problem(str(folder / WEIGHTS_FILE), problem) for problem in problems])
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def _with_place_for(base_model: Any, settings: Mapping[str, Any], name: str) -> PeftModel:
    """The model with an adapter of these settings, whose weights are to come.

    Raises:
        InputError, ValueError, TypeError, NotImplementedError: it does not fit the model.
    """
    kind = ACCEPTED[settings["peft_type"]]
    known = {
        key: value
        for key, value in settings.items()
        if value is not None and key in kind.config.__dataclass_fields__ and key not in kind.of_model
    }
    pattern = known.pop("rank_pattern", None) if settings["peft_type"] == PeftType.ADALORA else None
    config = kind.config(**{**known, "task_type": "CAUSAL_LM", "inference_mode": True, **kind.fixed})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(base_model, PeftModel):
            base_model.add_adapter(name, config)
            model = base_model
        else:
            model = PeftModelForCausalLM(base_model, config, adapter_name=name)
        if pattern:
            cut_layers(model, name, pattern)
    if config.is_prompt_learning:
        match_precision(model, name)
    return model


def _check_company(model: PeftModel, kind: str, name: str, folder: Path) -> None:
    if model.peft_type != kind:
        rule = f"the model carries {model.peft_type.value}, to which no {kind} can be added: a model has one kind"
        raise InputError(Problem(str(folder), rule))
    if name in model.peft_config:
        raise InputError(Problem(str(folder), f'the model has an adapter "{name}" already'))


class _Before:
    """A model as it is before PEFT changes it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._plain = model.get_base_model() if isinstance(model, PeftModel) else model
        self._modules = dict(self._plain.named_modules())
        self._trained = {id(parameter): parameter.requires_grad for parameter in model.parameters()}

    def restore(self, name: str) -> None:
        """Takes adapter `name`, as far as it got, out again."""
        if isinstance(self._model, PeftModel) and name in self._model.peft_config:
            self._model.delete_adapter(name)
        for key, module in self._modules.items():
            if key and self._plain.get_submodule(key) is not module:
                self._plain.set_submodule(key, module)
        for parameter in self._plain.parameters():
            parameter.requires_grad_(self._trained.get(id(parameter), parameter.requires_grad))

    def freeze_the_rest(self, model: PeftModel) -> None:
        """Freezes what was not there, and gives the adapters that were there their flags back, which PEFT may drop."""
        is_further = model is self._model
        for parameter in model.parameters():
            if id(parameter) not in self._trained:
                parameter.requires_grad_(False)
            elif is_further:
                parameter.requires_grad_(self._trained[id(parameter)])


def _save_weights(model: Any, folder: Path) -> None:
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def _differences(model: PeftModel, name: str, settings: Mapping[str, Any], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors and settings of a folder from fitting the place that the model has for them."""
    kind, config = ACCEPTED[settings["peft_type"]], model.peft_config[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    problems = [
        f"the adapter was made for {key} {settings[key]}, the model has {getattr(config, key)}"
        for key in kind.of_model
        if settings.get(key) is not None and settings[key] != getattr(config, key)
    ]
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    if missing:
        matched = len(expected) - len(missing)
        problems.append(f"expected {len(expected)} tensors, matched {matched}; missing: {', '.join(missing[:3])}")
    if unknown:
        problems.append(f"{len(unknown)} tensors the model has no place for: {', '.join(unknown[:3])}")
    wrong = [key for key in expected if key in found and expected[key].shape != found[key].shape]
    if wrong:
        key = wrong[0]
        sizes = f"{key} is {tuple(found[key].shape)}, the model needs {tuple(expected[key].shape)}"
        rank = None if kind.rank is None else getattr(config, kind.rank)
        reason = _mismatch_reason(expected, found, wrong=wrong, rank=rank, hidden_size=model.config.hidden_size)
        problems.append(f"{reason}{len(wrong)} tensors of another size: {sizes}")
    return problems


def _mismatch_reason(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, wrong: list[str], rank: int | None, hidden_size: int
) -> str:
    """The usual reasons in words: another rank than the configuration says, or another base model."""
    for key in (key for key in wrong if key.endswith(("lora_A.weight", "lora_A")) and found[key].ndim == 2):
        if rank is not None and found[key].shape[0] != rank:
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
