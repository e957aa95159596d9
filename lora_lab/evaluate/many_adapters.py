"""Many adapters on one loaded base, one after another: each scored as if it alone had been loaded."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedTokenizerBase

from lora_lab.adapters.changed import ABOUT_FILE
from lora_lab.adapters.folder import CONFIG_FILE, read_adapter
from lora_lab.adapters.taken_off import adapter_on
from lora_lab.errors import EvaluationError, InputError, Problem
from lora_lab.evaluate.guard_note import note_of
from lora_lab.evaluate.harness import Scores, evaluate_model
from lora_lab.evaluate.weights_digest import weights_digest
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.labels import check_label

_MODEL_CONFIG_FILE = "config.json"


def evaluate_adapters(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    folders: Mapping[str, Path],
    evaluation: Evaluation,
    *,
    cache: Path,
    output: Path,
) -> dict[str, Scores]:
    """Scores of `base` with each adapter of `folders`, in their order; see `evaluate_model` for what each gets.

    folders: name -> folder of a saved adapter, of any kind that `load_adapter` takes. The files of an adapter go to
    `output` / its name. All folders are checked before the first is scored. Scores are equal, bit for bit, to those of
    the adapter on a freshly loaded base: after each the base is what it was, which is checked by `weights_digest`. The
    guard compares with lm-eval's engine once per kind of adapter.

    Raises:
        InputError: with every problem: names that cannot be a folder's, folders that hold no usable adapter (changed
            weights or a whole model are bases of their own); later, an adapter that does not fit this base.
        EvaluationError: see `evaluate_model`; or an adapter has left the base changed, so no further one is scored.
        ValueError: `base` carries adapters already.
    """
    if isinstance(base, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("evaluate_adapters needs the base alone, but it carries adapters already")
    _check(folders)
    before = weights_digest(base)
    scores = {}
    for name, folder in folders.items():
        with adapter_on(base, folder) as model:
            note = note_of(before, _kind(model.active_peft_config), evaluation, device=base.device.type, cache=cache)
            scores[name] = evaluate_model(
                model, tokenizer, evaluation, cache=cache, output=output / name, guard_note=note
            )
        del model
        gc.collect()  # an adapter's layers know each other in circles
        if weights_digest(base) != before:
            rule = "taken off, it has left the base changed; the adapters after it were not scored"
            raise EvaluationError(Problem(str(folder), rule))
    return scores


def _kind(config: Any) -> str:
    """What computes in another way: PEFT has DoRA as a setting of LoRA."""
    return f"{config.peft_type} with DoRA" if getattr(config, "use_dora", False) else str(config.peft_type)


def _check(folders: Mapping[str, Path]) -> None:
    problems: list[Problem] = []
    for name, folder in folders.items():
        try:
            check_label(name)
        except ValueError as error:
            problems.append(Problem(f"adapter {name!r}", str(error)))
        kind = _other_kind(folder)
        if kind is not None:
            problems.append(Problem(str(folder), f"holds {kind}, not an adapter; load it as a base and score that"))
            continue
        try:
            read_adapter(folder)
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(problems)


def _other_kind(folder: Path) -> str | None:
    """What a folder without an adapter holds, of the things that methods save."""
    if (folder / CONFIG_FILE).is_file():
        return None
    if (folder / ABOUT_FILE).is_file():
        return "changed weights of a base"
    return "a whole model" if (folder / _MODEL_CONFIG_FILE).is_file() else None
