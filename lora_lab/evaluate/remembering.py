"""The lab's lm-eval model with a memory: what the same model was asked before, under the same settings, is looked up.

A hit needs all of this to be the same: weights, adapter and everything else the model computes with
(`weights_digest`), its tokenizer, every setting that a score may depend on to the last bit, versions and examples of
the tasks, library versions, and the requests. The number of threads is left out; scores may differ by it, but within
rounding, and a sweep may run with more or fewer.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.tasks import TaskManager
from torch import nn

from lora_lab.evaluate.lab_model import LabModel
from lora_lab.evaluate.score_cache import RequestType, ScoreCache
from lora_lab.evaluate.tree.sizes import budget_of
from lora_lab.evaluate.weights_digest import weights_digest
from lora_lab.schema.fingerprint import NUMERICS_VERSION

_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "lm_eval")
# HFLM's settings that change scores, beside those with a name of their own in the key.
_SETTINGS = (
    "add_bos_token",
    "backend",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
_TOKENIZER_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "special_tokens_map",
    "truncation_side",
)


class NotedTasks(TaskManager):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's task manager; `note` is told of the tasks (by name) whenever some are loaded."""

    def __init__(self, note: Callable[[Mapping[str, Any]], None], **settings: Any) -> None:
        super().__init__(**settings)
        self._note = note

    def load(self, task_list: Any) -> Any:
        """As lm-eval does it."""
        loaded = super().load(task_list)
        self._note(loaded["tasks"])
        return loaded


class RememberingModel(LabModel):
    """LabModel whose answers are looked up and kept in the folder `remember_in`; with None it is LabModel.

    about: JSON values of the evaluation that belong to the key (limit, seeds). applies_chat_template: whether lm-eval
    is told to; the template is then part of the key. settings: LabModel's.

    What a call leaves beside its answers (`truncated_requests`, `engine_facts`) is kept with them and is there again.

    Raises:
        ValueError: it is asked before `note_tasks` has named the tasks.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        *,
        remember_in: Path | None,
        about: Mapping[str, Any],
        applies_chat_template: bool,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, **settings)
        self._scores = None if remember_in is None else ScoreCache(remember_in)
        template = _sha256(str(self.tokenizer.chat_template)) if applies_chat_template else None
        self._about = {**about, "chat_template": template}
        self._tasks: Mapping[str, Any] = {}
        self._model_facts: dict[str, Any] | None = None
        self._hits: list[str] = []
        self._keys: dict[str, str] = {}

    @property
    def score_cache_facts(self) -> dict[str, Any] | None:
        """hits: kinds of requests that were not computed but looked up; keys: kind -> key. None without a memory."""
        return None if self._scores is None else {"hits": list(self._hits), "keys": dict(self._keys)}

    def note_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Says by name which of lm-eval's tasks the requests come from; their versions are part of the key."""
        self._tasks = tasks

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See LabModel."""
        compute = functools.partial(super().loglikelihood, requests, disable_tqdm=disable_tqdm)
        return self._remembered("loglikelihood", requests, compute)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """See LabModel."""
        compute = functools.partial(super().loglikelihood_rolling, requests, disable_tqdm=disable_tqdm)
        return self._remembered("loglikelihood_rolling", requests, compute)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See LabModel."""
        compute = functools.partial(super().generate_until, requests, disable_tqdm=disable_tqdm)
        return self._remembered("generate_until", requests, compute)

    def _remembered(self, kind: RequestType, requests: Sequence[Any], compute: Callable[[], list[Any]]) -> list[Any]:
        if self._scores is None:
            return compute()
        truncated, told = self.truncated_requests, len(self.engine_facts)

        def computed() -> tuple[list[Any], dict[str, Any]]:
            values = compute()
            cut = self.truncated_requests - truncated
            return values, {"truncated_requests": cut, "engine_facts": self.engine_facts[told:]}

        found = self._scores.answers(kind, requests, self._facts_of(requests), computed)
        self._keys[kind] = found.key
        if found.from_cache:
            self._hits.append(kind)
            self.truncated_requests += found.notes["truncated_requests"]
            self.engine_facts += found.notes["engine_facts"]
        return found.values

    def _facts_of(self, requests: Sequence[Any]) -> dict[str, Any]:
        names = sorted({str(request.task_name) for request in requests})
        unknown = [name for name in names if name not in self._tasks]
        if unknown:
            raise ValueError(f"no task was noted by the name of {', '.join(unknown)}; call note_tasks first")
        tasks = {name: _task_facts(self._tasks[name]) for name in names}
        if self._model_facts is None:  # it does not change between two calls
            self._model_facts = model_facts(self)
        return self._model_facts | {"evaluation": self._about, "tasks": tasks}


def model_facts(lm: Any) -> dict[str, Any]:
    """All of a LabModel that its answers may depend on to the last bit, as JSON values."""
    model = lm.model
    quantization = getattr(model.config, "quantization_config", None)
    libraries = _LIBRARIES if quantization is None else (*_LIBRARIES, "bitsandbytes")
    return {
        "weights": weights_digest(model),
        "dtype": str(model.dtype),
        "quantization": None if quantization is None else _shown(quantization),
        "device": _device(lm.device),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "engine": lm.engine,
        "budget": asdict(budget_of(model, lm.chunk_tokens)),
        "batch_size": lm.batch_size,
        "max_length": lm.max_length,
        "settings": {name: _shown(getattr(lm, name)) for name in _SETTINGS},
        "tokenizer": tokenizer_digest(lm.tokenizer),
        "versions": {name: version(name) for name in libraries} | {"lora_lab numerics": NUMERICS_VERSION},
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) over what turns texts into tokens and back: vocabulary, merges, rules, marks and padding.

    A tokenizer without a backend in Rust is known by its class and vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # of the last call
            rules.pop(name, None)
    settings = {name: _shown(getattr(tokenizer, name, None)) for name in _TOKENIZER_SETTINGS}
    return _sha256(json.dumps([rules, settings], sort_keys=True))


def _task_facts(task: Any) -> dict[str, Any]:
    """Read when the task is asked about: lm-eval sets the number of examples after loading."""
    return {"version": task.VERSION, "num_fewshot": task.get_config("num_fewshot")}


def _device(device: torch.device) -> str:
    """Kernels are chosen by the kind of processor, and with them the order of sums."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _shown(entry) for key, entry in value.items()}
    return str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
