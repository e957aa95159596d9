"""What must be true of a finished sweep, however it came about: whole files, whole logs, one result per trial; and of
two sweeps over the same trials: equal results within the equality rule (float64: 1e-9; float32: losses to 1e-5)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lora_lab.record.layer_log import observed_steps
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import read_steps
from tests.kill_loop import SAVED_FOLDERS

Files = Mapping[str, tuple[bytes, int]]

# How far two executions of a trial may lie apart: metrics and losses, and saved weights where they are compared.
_METRIC_TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}
_WEIGHT_TOLERANCE = {"fp64": 1e-10}
_MOST_REASONS = 10


def files_of(folder: Path) -> Files:
    """Content and time of every file of a run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def result_of(record: RunRecord) -> Result:
    """The result, which must be there."""
    assert record.result is not None, f"{record.name}: {record.state} {record.problem}"
    return record.result


def damages(record: RunRecord) -> list[str]:
    """Everything wrong with the files of a finished run."""
    return [f"{record.name}: {problem}" for problem in (*_broken_files(record.folder), *_broken_logs(record))]


def _broken_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("attempts/") or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                text = path.read_text()
                assert text.endswith("\n"), "torn last line"
                for line in text.splitlines():
                    json.loads(line)
            elif path.suffix == ".safetensors":
                assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), "not finite"
        except (ValueError, AssertionError) as error:
            yield f"{name}: {error}"


def _broken_logs(record: RunRecord) -> Iterator[str]:
    result = result_of(record)
    if record.trial["method"]["kind"] == "base":
        return
    steps = [line["step"] for line in read_steps(record.steps_path)]
    if steps != list(range(1, int(result.measurements["steps"]) + 1)):
        yield f"steps.jsonl has steps {steps}, the result says {result.measurements['steps']}"
    layers = record.layers_path.read_text() if record.layers_path.exists() else ""
    lines = [json.loads(line) for line in layers.splitlines()]
    observed = Counter((line["step"], line["kind"]) for line in lines)
    twice = {key: count for key, count in observed.items() if count > 1}
    if twice:
        yield f"layers.jsonl repeats {twice}"
    total = record.trial["training"]["max_steps"]
    expected = {step for step in observed_steps(total) if step <= len(steps)}
    if {step for step, kind in observed if kind == "norms"} != expected:
        yield f"layers.jsonl has norms after steps {sorted({step for step, _ in observed})}, not {sorted(expected)}"
    cards = [record.folder / name / "README.md" for name in SAVED_FOLDERS if (record.folder / name).is_dir()]
    for card in cards:
        if record.run_id not in card.read_text():
            yield f"{card.parent.name}/README.md is not the card of this run"


def changes(before: Files, after: Files) -> list[str]:
    """Files of a finished run that a later call has touched."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def differences(one: RunRecord, other: RunRecord) -> list[str]:
    """Where two executions of the same trial disagree by more than the equality rule allows."""
    precision = one.trial["training"]["precision"]
    tolerance = _METRIC_TOLERANCE[precision]
    first, second = result_of(one), result_of(other)
    found: list[str] = []
    if (first.status, _step_of(first.reason)) != (second.status, _step_of(second.reason)):
        found.append(f"{first.status} {first.reason} against {second.status} {second.reason}")
    for name in ("trainable_parameters", "total_parameters"):
        if getattr(first, name) != getattr(second, name):
            found.append(f"{name}: {getattr(first, name)} against {getattr(second, name)}")
    for name in ("steps", "tokens", "loss_tokens", "train_rows", "cut_rows"):
        if first.measurements.get(name) != second.measurements.get(name):
            found.append(f"{name}: {first.measurements.get(name)} against {second.measurements.get(name)}")
    if first.metrics.keys() != second.metrics.keys():
        found.append(f"metrics {sorted(first.metrics)} against {sorted(second.metrics)}")
    for name in first.metrics.keys() & second.metrics.keys():
        found += _apart(name, first.metrics[name].value, second.metrics[name].value, tolerance)
    found += _curves_apart(read_steps(one.steps_path), read_steps(other.steps_path), tolerance)
    if precision in _WEIGHT_TOLERANCE:
        found += _weights_apart(one.folder, other.folder, _WEIGHT_TOLERANCE[precision])
    return [f"{one.name}: {problem}" for problem in found[:_MOST_REASONS]]


def _step_of(reason: str | None) -> str:
    """`step 3` of "step 3: loss nan, gradient norm inf": the numbers behind it may differ."""
    return (reason or "").partition(":")[0]


def _apart(name: str, one: float, other: float, tolerance: float) -> list[str]:
    """Within `tolerance` of each other; in proportion beyond 10, which no loss reaches that is not on its way out."""
    close = math.isclose(one, other, rel_tol=tolerance / 10, abs_tol=tolerance)
    return [] if close else [f"{name}: {one} against {other}, {abs(one - other):.1e} apart"]


def _curves_apart(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], tolerance: float) -> list[str]:
    found: list[str] = []
    if len(one) != len(other):
        return [f"{len(one)} steps against {len(other)}"]
    for first, second in zip(one, other, strict=True):
        step = first["step"]
        exact = [key for key in ("step", "learning_rate", "tokens", "loss_tokens") if first.get(key) != second.get(key)]
        found += [f"step {step}: {key} {first.get(key)} against {second.get(key)}" for key in exact]
        found += _apart(f"loss of step {step}", first["loss"], second["loss"], tolerance)
    return found


def _weights_apart(one: Path, other: Path, tolerance: float) -> list[str]:
    found: list[str] = []
    for path in sorted(path for name in SAVED_FOLDERS for path in (one / name).glob("*.safetensors")):
        first, second = load_file(path), load_file(other / path.relative_to(one))
        if first.keys() != second.keys():
            found.append(f"{path.name}: other tensors")
            continue
        for key, tensor in first.items():
            apart = float((tensor.double() - second[key].double()).abs().max())
            if not apart <= tolerance or tensor.dtype != second[key].dtype:
                found.append(f"{key} ({tensor.dtype}, {second[key].dtype}): {apart:.1e} apart")
    return found


def tables_apart(one: Mapping[str, Any], other: Mapping[str, Any], precisions: Mapping[str, str]) -> list[str]:
    """Where two tables (`--json`) of the same trials disagree; `precisions` by setting. Time and memory are not looked
    at. Row order counts."""
    same = ("name", "setting", "is_base", "axes", "runs", "completed", "statuses", "trainable_parameters")
    found = [] if one["metrics"] == other["metrics"] else [f"columns {one['metrics']} against {other['metrics']}"]
    if len(one["rows"]) != len(other["rows"]):
        return [*found, f"{len(one['rows'])} rows against {len(other['rows'])}"]
    for first, second in zip(one["rows"], other["rows"], strict=True):
        found += [f"{first['name']}: {key}" for key in same if first[key] != second[key]]
        tolerance = _METRIC_TOLERANCE[precisions[first["setting"]]]
        for name, cell in first["metrics"].items():
            against = second["metrics"][name]
            if (cell["mean"] is None) != (against["mean"] is None) or cell["missing"] != against["missing"]:
                found.append(f"{first['name']} {name}: {cell} against {against}")
            elif cell["mean"] is not None:
                found += _apart(f"{first['name']} {name}", cell["mean"], against["mean"], tolerance)
    return found


def precision_by_setting(records: Sequence[RunRecord]) -> dict[str, str]:
    """Precision of the trainings by the fingerprint of their setting."""
    return {str(record.setting): record.trial["training"]["precision"] for record in records}


def resumable(record: RunRecord) -> tuple[int, int] | None:
    """(attempt, steps that it logged) of the last attempt at an unfinished run that left a checkpoint."""
    attempts = {int(folder.name): folder for folder in (record.folder / "attempts").glob("*")}
    if record.header is not None and record.state != "RUNNING":
        attempts[record.header.attempt] = record.folder
    left = [
        (number, folder)
        for number, folder in sorted(attempts.items())
        if (folder / "checkpoint" / "checkpoint.json").exists()
    ]
    if not left:
        return None
    number, folder = left[-1]
    return number, len(read_steps(folder / "steps.jsonl"))
