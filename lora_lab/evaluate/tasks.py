"""Task files for lm-eval: plain YAML and JSON lines under the cache, named by their content.

Nothing here imports lm-eval or loads a model, so a run prepares its tasks first and finds out early what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lora_lab.data.skills import TRAINED, UNSEEN
from lora_lab.evaluate.check import Located, check_evaluation, locate_tasks
from lora_lab.evaluate.local_documents import (
    CHOICES,
    Document,
    completion_documents,
    perplexity_documents,
    skills_documents,
)
from lora_lab.evaluate.mirror import mirror_configs
from lora_lab.schema.evaluation import Evaluation, ProseTasks, SkillsTasks

_VERSION = 1  # of the four tasks below; raised when a prompt or a document changes
_CHOICE_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
_ROLLING_METRICS = [
    {"metric": name, "aggregation": aggregation, "higher_is_better": False}
    for name, aggregation in (
        ("word_perplexity", "weighted_perplexity"),
        ("byte_perplexity", "weighted_perplexity"),
        ("bits_per_byte", "bits_per_byte"),
    )
]
_SHAPES: Mapping[str, dict[str, Any]] = {
    "skills": {"output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:"},
    "completion": {"output_type": "multiple_choice", "doc_to_text": "{{start}}"},
    "perplexity": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{passage}}"},
}


@dataclass(frozen=True, slots=True)
class PreparedTasks:
    """names: as lm-eval is to be asked for them. folders: where it finds the files that are not its own.
    needs_defaults: whether its own index is needed too (12 to 18 seconds). chance: task -> score of guessing."""

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    needs_defaults: bool
    chance: Mapping[str, float]


def prepare_tasks(evaluation: Evaluation, *, cache: Path) -> PreparedTasks:
    """Checks `evaluation` (see `check_evaluation`) and writes the task files it needs.

    Raises:
        InputError, DataError, IdentityError: what cannot be scored, and why.
    """
    check_evaluation(evaluation, cache=cache)
    located = locate_tasks(evaluation, cache=cache)
    folders = []
    if located.local:
        folders.append(_write(cache, _local_configs(evaluation, located.local)))
    if located.mirror is not None and located.official:
        configs = mirror_configs(located.mirror, located.catalogue, located.official)
        folders.append(_write(cache, {name: (config, None) for name, config in configs.items()}))
    if located.user and evaluation.include_path is not None:
        folders.append(Path(evaluation.include_path).expanduser().absolute())
    return PreparedTasks(
        names=tuple(evaluation.tasks),
        folders=tuple(folders),
        needs_defaults=_needs_defaults(located),
        chance={name: 1 / CHOICES for name in located.local if name != "prose_perplexity"},
    )


def _needs_defaults(located: Located) -> bool:
    return bool(located.official) and located.mirror is None


def _local_configs(evaluation: Evaluation, names: Sequence[str]) -> dict[str, tuple[dict[str, Any], list[Document]]]:
    return {name: _local_task(name, evaluation.skills, evaluation.prose) for name in names}


@lru_cache(maxsize=16)  # every run of a sweep asks for the same documents
def _local_task(name: str, skills: SkillsTasks, prose: ProseTasks) -> tuple[dict[str, Any], list[Document]]:
    documents: list[Document]
    if name == "prose_perplexity":
        shape, documents = "perplexity", perplexity_documents(prose)
    elif name == "prose_completion":
        shape, documents = "completion", completion_documents(prose)
    else:
        chosen = TRAINED if name == "skills_trained" else UNSEEN
        shape, documents = "skills", skills_documents(chosen, skills)
    config = {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "num_fewshot": 0,
        **_SHAPES[shape],
        "metadata": {"version": _VERSION},
    }
    if shape == "perplexity":
        config["metric_list"] = _ROLLING_METRICS
    else:
        config |= {"doc_to_choice": "choices", "doc_to_target": "label", "metric_list": _CHOICE_METRICS}
    return config, documents


def _write(cache: Path, configs: Mapping[str, tuple[dict[str, Any], list[Document] | None]]) -> Path:
    """The folder with these tasks, written once: its name is a hash of the content, and it appears in one piece."""
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / "tasks" / digest
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{digest}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, (config, documents) in configs.items():
        content = dict(config)
        if documents is not None:
            rows = partial / f"{name}.jsonl"
            rows.write_text("".join(f"{json.dumps(document)}\n" for document in documents), encoding="utf-8")
            data_file = str((folder / rows.name).absolute())
            content["dataset_kwargs"] = {"data_files": {"test": [data_file]}}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (partial / f"{name}.yaml").write_text(text, encoding="utf-8")
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)  # another process was first
    return folder
