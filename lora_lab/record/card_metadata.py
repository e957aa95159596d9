"""The head of a model card: what the Hugging Face hub reads of it, as YAML between two lines of dashes.

Only what is known: a base model where it is a repository of the hub, no licence (the lab does not know it), and scores
as `model-index`. A model index has no place for a standard error; the intervals are in the text below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_lab.record.markdown import one_line
from lora_lab.record.parents import WEIGHTS
from lora_lab.record.result import Metric, Result
from lora_lab.record.run_record import RunHeader
from lora_lab.schema.data import Data, HubData, JsonlData
from lora_lab.schema.model import HubModel
from lora_lab.schema.trial import Trial

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_TASK = {"type": "text-generation", "name": "Text Generation"}


def front_matter(header: RunHeader, result: Result, trial: Trial) -> str:
    """The block from `---` to `---`."""
    has_adapter = trial.method.has_adapter
    values: dict[str, Any] = {
        "library_name": "peft" if has_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    belongs_elsewhere = has_adapter and WEIGHTS in header.identities  # the hub would load it on the plain model
    if isinstance(trial.model, HubModel) and _REPOSITORY.fullmatch(trial.model.repo) and not belongs_elsewhere:
        values["base_model"] = trial.model.repo
        values["base_model_relation"] = "adapter" if has_adapter else "finetune"
    if isinstance(trial.data, HubData) and _REPOSITORY.fullmatch(trial.data.repo):
        values["datasets"] = [trial.data.repo]
    values["tags"] = _tags(trial)
    if scores := _scores(result, trial):
        values["model-index"] = [{"name": one_line(header.name), "results": scores}]
    dumped = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf"))
    return f"---\n{dumped}---\n"


def is_score(name: str) -> bool:
    """Whether a metric is a score of the trained model; the loss of a training step is none."""
    return not name.startswith("train/")


def data_name(data: Data) -> str:
    """What the rows are called; of a local file only its name."""
    if isinstance(data, HubData):
        return data.repo
    return Path(data.path).name if isinstance(data, JsonlData) else f"reasoning-gym {data.package_version}"


def _tags(trial: Trial) -> list[str]:
    quantization = trial.quantization.kind
    return ["lora-lab", trial.method.kind, *([quantization] if quantization != "none" else [])]


def _scores(result: Result, trial: Trial) -> list[dict[str, Any]]:
    """One entry per set of rows that was scored, in the shape of the hub's model index."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for name, metric in result.metrics.items():
        source, _, measure = name.partition("/")
        if is_score(name):
            by_source.setdefault(source, []).append(_score(measure, metric))
    shots = result.facts.get("evaluation", {}).get("num_fewshot", {})
    return [
        {"task": _TASK.copy(), "dataset": _dataset(source, trial.data, shots), "metrics": metrics}
        for source, metrics in by_source.items()
    ]


def _score(measure: str, metric: Metric) -> dict[str, Any]:
    """A filter of lm-eval (`exact_match,strict-match`) belongs to the name, not to the type."""
    plain = one_line(measure)
    return {"type": plain.partition(",")[0], "value": metric.value, "name": f"{plain} ({one_line(metric.unit)})"}


def _dataset(source: str, data: Data, shots: Mapping[str, int]) -> dict[str, Any]:
    if source != "heldout":
        task = one_line(source)
        known = {"args": {"num_few_shot": shots[source]}} if source in shots else {}
        return {"name": f"{task} (lm-eval)", "type": task, **known}
    name = f"{one_line(data_name(data))}, held-out rows"
    if not isinstance(data, HubData):
        return {"name": name, "type": data.kind}
    config = {} if data.config is None else {"config": one_line(data.config)}
    return {
        "name": name,
        "type": one_line(data.repo),
        **config,
        "split": one_line(data.split),
        "revision": one_line(data.revision),
    }
