"""lm-eval's returned mapping as metrics with units. Needs neither torch nor lm-eval."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.record.result import Metric

_UNITS = {
    "acc": "fraction",
    "acc_norm": "fraction",
    "exact_match": "fraction",
    "f1": "fraction",
    "word_perplexity": "perplexity/word",
    "byte_perplexity": "perplexity/byte",
    "perplexity": "perplexity/token",
    "bits_per_byte": "bits/byte",
}
_GUESSED = ("acc", "acc_norm")


def read_metrics(
    results: Mapping[str, Any], *, chance: Mapping[str, float]
) -> tuple[dict[str, Metric], dict[str, str]]:
    """`task/metric` -> Metric, and the names that are missing with the reason.

    A filter other than `none` stays in the name, as lm-eval writes it: `gsm8k/exact_match,strict-match`. Standard
    errors are lm-eval's, None where it computed none. `chance`: by task, for `acc` and `acc_norm`; else one over the
    number of choices, where lm-eval's samples show a plain multiple choice.
    """
    metrics: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    for task, values in results["results"].items():
        guess = chance.get(task, _chance(results, task))
        for key, value in values.items():
            measure, comma, filtered = key.partition(",")
            if not comma or measure.endswith("_stderr"):
                continue
            name = f"{task}/{measure}" if filtered == "none" else f"{task}/{key}"
            direction = results["higher_is_better"].get(task, {}).get(measure)
            reason = _why_missing(value, direction)
            if reason is not None:
                missing[name] = reason
                continue
            metrics[name] = Metric(
                value=float(value),
                unit=_UNITS.get(measure, "score"),
                higher_is_better=direction,
                standard_error=_number(values.get(f"{measure}_stderr,{filtered}")),
                num_examples=values.get("sample_len"),
                chance=guess if measure in _GUESSED else None,
            )
    return metrics, missing


def task_hashes(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """A hash per task over what was asked: documents, prompts and targets, by lm-eval's own sample hashes."""
    return {
        task: hashlib.sha256(
            "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows).encode()
        ).hexdigest()
        for task, rows in samples.items()
    }


def _why_missing(value: object, direction: object) -> str | None:
    if _number(value) is None:
        return f"lm-eval gave {value!r}"
    if not isinstance(direction, bool):
        return "lm-eval does not say whether higher is better"
    return None


def _number(value: object) -> float | None:
    """A finite float, or None: lm-eval writes N/A where it computed nothing, and blanks for groups."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _chance(results: Mapping[str, Any], task: str) -> float | None:
    """Mean of one over the number of choices; None unless every sample has one right answer among its requests."""
    config = results["configs"].get(task, {})
    samples = results["samples"].get(task, [])
    if config.get("output_type") != "multiple_choice" or config.get("process_results") or not samples:
        return None
    measures = {str(entry.get("metric")) for entry in config.get("metric_list") or ()}
    if "acc_mutual_info" in measures or not all(isinstance(row["target"], int | str) for row in samples):
        return None
    return math.fsum(1 / len(row["arguments"]) for row in samples) / len(samples)
