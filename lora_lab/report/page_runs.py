"""The runs of a page: one line each, and all that the page of a single run shows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_lab.errors import DataError, LabError
from lora_lab.record.atomic import read_json
from lora_lab.record.cohort_facts import SHARED, cohort_of, why_missing
from lora_lab.record.flat import dotted
from lora_lab.record.result import Metric, Result, Status
from lora_lab.record.run_record import ADAPTER_FOLDER, ENVIRONMENT_FILE, EVAL_FOLDER, RunRecord
from lora_lab.report.cohort_words import missing_of_runs
from lora_lab.report.page_layers import layer_sections
from lora_lab.report.page_memory import memory_view
from lora_lab.report.page_settings import SETTING_DIGITS
from lora_lab.report.text import UNKNOWN, bytes_text, clean, count_text, number_text, seconds_text, value_text
from lora_lab.study.curves import RunCurve, run_curves
from lora_lab.study.interval import normal_half_width
from lora_lab.study.samples import read_answers

_CURVES = {
    "loss": "nats/token",
    "learning_rate": "learning rate",
    "gradient_norm": "norm",
    "tokens_per_second": "tokens/s",
    "allocated_bytes": "bytes",
    "rss_bytes": "bytes",
    f"{SHARED}tokens_per_second": "tokens/s of the whole cohort",
    f"{SHARED}allocated_bytes": "bytes of the whole cohort",
    f"{SHARED}rss_bytes": "bytes of the whole cohort",
}
_COSTS = (("peak_allocated_bytes", "peak memory"), ("train_seconds", "train time"), ("tokens_per_second", "tokens/s"))
# Losses beside the language model's own: as they are, before their weights.
_AUXILIARY, _AUXILIARY_UNIT = "_loss", "loss, before its weight"
# Of many runs the page keeps fewer points each, and no loads of experts; the runs' own files have them all.
_CURVE_POINTS, _CURVE_POINTS_OF_MANY, _MANY = 120, 40, 200
_TEXT_LIMIT = 4_000  # of one sample text or reason; the files hold the rest
# The host's name is of no use to a reader, and not everybody's to know.
_PRIVATE = ("hostname",)


def run_columns(metric: str | None) -> list[dict[str, Any]]:
    """Headings of the table of runs; `metric` is the score that is shown."""
    numbers = (metric or "score", *(title for _, title in _COSTS))
    return [{"title": title, "is_number": title in numbers} for title in ("run", "status", *numbers, "id")]


def run_rows(records: Sequence[RunRecord], metric: str | None) -> list[dict[str, Any]]:
    """One line per run; `metric` is the score that is shown."""
    return [
        {"id": record.run_id, "name": clean(record.name), "state": str(record.state), "cells": _cells(record, metric)}
        for record in records
    ]


def _cells(record: RunRecord, metric: str | None) -> list[dict[str, Any]]:
    result = record.result
    score = None if result is None or metric is None else result.metrics.get(metric)
    shown = {} if score is None else {"score": score.value}
    texts: dict[str, Callable[[float], str]] = {
        "score": number_text,
        "peak_allocated_bytes": bytes_text,
        "train_seconds": seconds_text,
        "tokens_per_second": lambda value: f"{value:,.0f}",
    }
    measured = shown | ({} if result is None else result.measurements)
    names = {"score": metric or "score"}
    return [
        _cell(measured[name], write(measured[name]))
        if name in measured
        else _cell(None, UNKNOWN, clean(why_missing(result, names.get(name, name))))
        for name, write in texts.items()
    ]


def _cell(sort: float | int | None, text: str, hint: str = "") -> dict[str, Any]:
    return {"sort": sort, "text": text, "hint": hint}


def run_notes(records: Sequence[RunRecord]) -> list[str]:
    """Why runs have no memory, time or speed in the table of runs, by reason."""
    return [clean(f"{line[0].upper()}{line[1:]}.") for line in missing_of_runs(records, _COSTS)]


def run_blocks(records: Sequence[RunRecord], folders: Mapping[str, str], order: Sequence[str]) -> dict[str, Any]:
    """JSON blocks by id: one per run, and `runs-common` with what they share. `order`: metrics that come first.

    The configuration that all runs have, and each distinct environment, are kept once.
    """
    is_large = len(records) > _MANY
    configs = [dotted(record.trial) for record in records]
    common = _common(configs)
    environments: list[list[list[str]]] = []
    blocks: dict[str, Any] = {}
    for record, config in zip(records, configs, strict=True):
        environment = _environment(record)
        if environment is not None and environment not in environments:
            environments.append(environment)
        blocks[f"run-data-{record.run_id}"] = {
            **_details(record, order, is_large=is_large),
            "folder": folders[record.run_id],
            "config": {key: clean(value_text(value)) for key, value in config.items() if key not in common},
            "environment": None if environment is None else environments.index(environment),
        }
    shared = {key: clean(value_text(value)) for key, value in common.items()}
    return {"runs-common": {"config": shared, "environments": environments}, **blocks}


def _common(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keys and values that all runs have; none for a single run, all of which is its own."""
    counts = Counter((key, json.dumps(value)) for config in configs for key, value in config.items())
    known = len(configs)
    if known < 2:
        return {}
    return {key: value for key, value in configs[0].items() if counts[key, json.dumps(value)] == known}


def _environment(record: RunRecord) -> list[list[str]] | None:
    try:
        content = read_json(record.folder / ENVIRONMENT_FILE)
    except LabError:
        return None
    if not isinstance(content, dict):
        return None
    flat = {key: value for key, value in dotted(content).items() if key not in _PRIVATE}
    return [[clean(key), _environment_text(key, value)] for key, value in flat.items() if value is not None]


def _environment_text(key: str, value: object) -> str:
    return bytes_text(value) if key.endswith("_bytes") and isinstance(value, int) else clean(value_text(value))


def _by_order(result: Result, order: Sequence[str]) -> list[str]:
    """The run's metrics, those of the page's table first and in its order."""
    return sorted(result.metrics, key=lambda name: order.index(name) if name in order else len(order))


def _details(record: RunRecord, order: Sequence[str], *, is_large: bool) -> dict[str, Any]:
    result = record.result
    answers, answers_missing = _answers(record)
    points = _CURVE_POINTS_OF_MANY if is_large else _CURVE_POINTS
    sections, unseen = layer_sections(record, with_loads=not is_large)
    missing = {**({} if result is None else result.missing), **unseen}
    if answers_missing:
        missing["answers"] = answers_missing
    return {
        "id": record.run_id,
        "name": clean(record.name),
        "state": str(record.state),
        "reason": _reason(record),
        "warnings": [] if result is None else [clean(str(text)) for text in result.facts.get("warnings", [])],
        "setting": None if record.setting is None else record.setting[:SETTING_DIGITS],
        "identity": _identity(record),
        "metrics": [] if result is None else [_metric(name, result.metrics[name]) for name in _by_order(result, order)],
        "measurements": [] if result is None else _measurements(result),
        "missing": [[clean(name), clean(reason)] for name, reason in missing.items()],
        "curves": _curves(run_curves(record, tuple(_CURVES), points=points, suffix=_AUXILIARY)),
        "layers": sections,
        "memory": None if result is None else memory_view(result),
        "answers": answers,
        "files": _files(record),
    }


def _reason(record: RunRecord) -> str | None:
    reason = record.problem or (None if record.result is None else record.result.reason)
    return None if reason is None or record.state == Status.COMPLETED else reason[:_TEXT_LIMIT]


def _identity(record: RunRecord) -> list[list[str]]:
    header, result = record.header, record.result
    pairs: list[tuple[str, object]] = [("attempts", record.attempts), ("numerics version", record.numerics_version)]
    if header is not None:
        pairs += [("fingerprint", header.fingerprint), ("setting", header.setting), ("repeat", header.repeat)]
        pairs += [("tag", header.tag), *header.identities.items()]
    if result is not None:
        pairs += [("started", result.started_at), ("finished", result.finished_at)]
        pairs += [("executed", _executed(result))]
    return [[clean(name), clean(str(value))] for name, value in pairs if value is not None]


def _executed(result: Result) -> str | None:
    """Alone, or with how many others."""
    cohort = cohort_of(result)
    if cohort is None:
        return None if "executed" not in result.facts else str(result.facts["executed"])
    return f"in cohort {cohort.id} of {cohort.seats} seats, together with {len(set(cohort.members)) - 1} others"


def _metric(name: str, metric: Metric) -> list[str]:
    error = metric.standard_error
    return [
        f"{clean(name)} {'↑' if metric.higher_is_better else '↓'}",
        f"{number_text(metric.value)} {clean(metric.unit)}",
        "-" if error is None else number_text(normal_half_width(error)),
        count_text(metric.num_examples),
        "-" if metric.chance is None else number_text(metric.chance),
    ]


def _measurements(result: Result) -> list[list[str]]:
    pairs: dict[str, float | int | None] = {
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
        "predicted_peak_allocated_bytes": result.predicted_peak_allocated_bytes,
        **result.measurements,
    }
    known = {name: value for name, value in pairs.items() if value is not None}
    return [[clean(name).replace("_", " "), _measured(name, value)] for name, value in known.items()]


def _measured(name: str, value: float | int) -> str:
    if name.endswith("_bytes"):
        return bytes_text(value)
    if name.endswith("_seconds"):
        return seconds_text(value)
    return count_text(value) if isinstance(value, int) else number_text(value)


def _curves(curve: RunCurve) -> dict[str, Any]:
    """`steps`: those of the longest curve; the others are of the same steps, as far as they go. Losses come first."""
    names = sorted(curve.series, key=lambda name: (name != "loss", not name.endswith(_AUXILIARY)))
    steps = max((series.steps for series in curve.series.values()), key=len, default=())
    return {
        "missing": curve.missing,
        "steps": list(steps),
        "values": {
            clean(key): {
                "y": [float(f"{value:.5g}") for value in series.values],
                "unit": _CURVES.get(key, _AUXILIARY_UNIT),
                **({} if series.steps == steps[: len(series.steps)] else {"x": list(series.steps)}),
            }
            for key, series in ((name, curve.series[name]) for name in names)
        },
    }


def _answers(record: RunRecord) -> tuple[list[dict[str, Any]], str | None]:
    try:
        answers = read_answers(record.eval_folder)
    except DataError as error:
        return [], str(error)
    return [
        {
            "prompt": answer.prompt[:_TEXT_LIMIT],
            "expected": answer.expected[:_TEXT_LIMIT],
            "answer": answer.answer[:_TEXT_LIMIT],
            "is_complete": answer.is_complete,
        }
        for answer in answers
    ], None


def _files(record: RunRecord) -> list[str]:
    """Names of the run's own files, relative to its folder."""
    names: list[str] = []
    for inner in ("", EVAL_FOLDER, ADAPTER_FOLDER):
        try:
            entries = sorted(entry.name for entry in (record.folder / inner).iterdir() if entry.is_file())
        except OSError:
            continue
        names += [f"{inner}/{name}" if inner else name for name in entries if name != "lock"]
    return names
