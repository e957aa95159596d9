"""Predictions of memory: one per distinct shape of a step, kept in memory and in the cache.

What does not change a step's memory (seeds, rates, alpha, length of training, scoring) is not looked at, so the trials
of a sweep share predictions. Kept ones carry a hash of this package's source and of the libraries that are traced.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_lab.errors import LabError
from lora_lab.plan.prediction import DeviceKind, LongestRows, Prediction, Style, prediction_of
from lora_lab.plan.timeline import Timeline
from lora_lab.predict.depths import Estimate, estimate
from lora_lab.predict.fake_model import Unpredictable, model_config
from lora_lab.predict.longest import longest_rows, rows_of
from lora_lab.predict.styles.litgpt import litgpt_step
from lora_lab.predict.traced_step import traced_step
from lora_lab.record.atomic import read_json, write_json
from lora_lab.schema.trial import Trial
from lora_lab.schema.weight_methods import Lisa

__all__ = ["Unpredictable", "longest_rows", "predict", "rows_of", "trace"]

_SECTIONS = ("model", "method", "quantization", "target", "rank", "dropout", "optimizer", "training")
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_memo: dict[str, Prediction | str] = {}


def predict(
    trial: Trial, rows: LongestRows, *, device_kind: DeviceKind, style: Style = "own", cache: Path | None = None
) -> Prediction:
    """The memory of a training step of `trial` on its longest rows; nothing is loaded.

    device_kind: whose way of counting. style: whose step (`schema.memory.Memory`). cache: where
    predictions are kept between processes.

    Raises:
        Unpredictable: with the reason.
    """
    key = key_of(trial, rows, device_kind=device_kind, style=style)
    path = None if cache is None else kept_path(cache, key)
    if key not in _memo:
        _memo[key] = _kept(path) or _predicted(trial, rows, device_kind, style)
    found = _memo[key]
    if isinstance(found, str):
        raise Unpredictable(found)
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found.to_json())
    return found


def trace(trial: Trial, rows: LongestRows, *, device_kind: DeviceKind, style: Style = "own") -> Timeline:
    """The course of memory over one step, traced in full; raises as `predict` does."""
    try:
        if style in ("litgpt", "litgpt_first"):
            first = style == "litgpt_first"
            return litgpt_step(trial, rows, device_kind=device_kind, first=first).timeline
        config = model_config(trial)
        return traced_step(trial, rows, config, device_kind=device_kind, labelled=style == "hf").timeline
    except LabError as error:
        raise Unpredictable(str(error)) from error


def _predicted(trial: Trial, rows: LongestRows, device_kind: DeviceKind, style: Style) -> Prediction | str:
    try:
        found = estimate(trial, rows, model_config(trial), device_kind=device_kind, style=style)
    except Unpredictable as error:
        return error.reason
    except LabError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - a model or method that cannot be traced is no reason not to run it
        return f"its step could not be traced: {type(error).__name__}: {str(error)[:200]}"
    return _told(trial, rows, device_kind, style, found)


def _told(trial: Trial, rows: LongestRows, device_kind: DeviceKind, style: Style, found: Estimate) -> Prediction:
    notes = []
    if trial.quantization.kind == "int8":
        notes.append("int8: no feature of the input is taken for an outlier")
    if isinstance(trial.method, Lisa):
        drawn = (
            "the layers of the first period" if device_kind == "cpu" else "the last layers, the draw that takes most"
        )
        notes.append(f"lisa: {drawn}")
    if found.paged_bytes:
        notes.append("paged optimizer states live in managed memory, outside the allocator")
    return Prediction(
        device_kind=device_kind,
        style=style,
        trainable_parameters=found.trainable_parameters,
        total_parameters=found.total_parameters,
        peak_allocated_bytes=found.peak.total,
        peak_reserved_bytes=found.reserved_bytes,
        parts=dict(found.peak.parts),
        place=str(found.peak.place),
        paged_bytes=found.paged_bytes,
        base_bytes=found.base_bytes,
        micro_batch_size=min(trial.training.micro_batch_size, len(rows.lengths)),
        longest_row=max(rows.lengths),
        rows=f"{rows.source}; {found.rows}",
        how=found.how,
        notes=tuple(notes),
    )


def key_of(trial: Trial, rows: LongestRows, *, device_kind: DeviceKind, style: Style) -> str:
    """The same for trials whose steps take the same memory, by this very code; in hex."""
    asked = trial.model_dump(mode="json", include=set(_SECTIONS))
    asked["model"] = {
        key: value for key, value in asked["model"].items() if key in ("kind", "path", "shape", "tie_embeddings")
    }
    for outside in ("epochs", "max_steps", "bucket_batches", "layer_rates"):
        asked["training"].pop(outside)
    asked["layers"] = trial.seeds.layers if isinstance(trial.method, Lisa) else None
    content: list[Any] = [asked, rows.lengths, rows.loss_tokens, rows.source, device_kind, style, _versions()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def kept_path(cache: Path, key: str) -> Path:
    """Where a prediction is kept."""
    return cache / "predictions" / f"{key}.json"


@functools.cache
def _versions() -> str:
    """Of everything that decides a trace: this package's source, and the libraries."""
    package = Path(__file__).resolve().parent.parent
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(path.read_bytes())
    return " ".join([source.hexdigest(), *(f"{name} {_version(name)}" for name in _LIBRARIES)])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _kept(path: Path | None) -> Prediction | None:
    """A prediction that was kept; None where there is none, or none that can be read."""
    if path is None:
        return None
    try:
        return prediction_of(read_json(path))
    except (LabError, OSError, KeyError, TypeError):
        return None
