"""Numbers behind a verdict: every arm's score with the runs it is from, and what the noise is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.record.run_record import RunRecord
from lora_lab.report.claim_rules import plain
from lora_lab.report.claims_view import form_text
from lora_lab.report.text import bytes_text, clean, count_text, seconds_text
from lora_lab.study.estimate import Estimate
from lora_lab.study.verdict import ArmScore, Verdict
from lora_lab.study.verdict_words import number, percent

_RATIOS = ("ratio", "ratio of times")


def arm_rows(
    verdicts: Sequence[Verdict], records: Mapping[str, RunRecord], links: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row per arm and form."""
    return [
        {
            "name": clean(arm.name),
            "form": form_text(verdict.form),
            "value": clean(arm.missing or "-") if arm.value is None else _value(arm.name, arm.value, verdict),
            "is_missing": arm.value is None,
            "hint": "" if arm.value is None else plain(arm.value),
            "error": "-" if arm.standard_error is None else number(arm.standard_error),
            "seeds": str(arm.seeds) if arm.seeds else "-",
            "rate": "" if arm.rate is None else f"{arm.rate:g}",
            "runs": [_run(run_id, records, links) for run_id in _ids(arm, records)],
        }
        for verdict in verdicts
        for arm in verdict.arms
    ]


def _value(name: str, value: float, verdict: Verdict) -> str:
    """In the unit of the metric, or as bytes, seconds and counts are written."""
    measure = verdict.metric or ""
    if "(" in name:  # a term of a formula, such as planned(total_parameters, lora)
        measure = name.partition("(")[2].partition(",")[0]
    elif verdict.unit not in _RATIOS:
        return f"{number(value)} {clean(verdict.unit or '')}".rstrip()
    if measure.endswith("_bytes"):
        return bytes_text(value)
    if measure.endswith("_seconds"):
        return seconds_text(value)
    return count_text(int(value)) if float(value).is_integer() else number(value)


def _ids(arm: ArmScore, records: Mapping[str, RunRecord]) -> list[str]:
    """Its runs; what was only counted before any run has none that could be missing."""
    return [run_id for run_id in arm.run_ids if run_id in records or not arm.name.startswith("planned(")]


def _run(run_id: str, records: Mapping[str, RunRecord], links: Mapping[str, str]) -> dict[str, Any]:
    record = records.get(run_id)
    if record is None:
        return {"text": f"{run_id} (not in the ledger)", "href": None, "title": ""}
    seed = record.trial.get("seed")
    repeat = "" if record.header is None or not record.header.repeat else f".r{record.header.repeat}"
    text = f"s{seed}{repeat}" if seed is not None else run_id
    title = clean(f"{record.name} {record.run_id}: {record.state}")
    return {"text": text, "href": links.get(run_id), "title": title}


def noise_view(verdict: Verdict) -> dict[str, Any] | None:
    """The variance of the estimate by what it comes from, in words and as shares; None where nothing was estimated."""
    estimate = verdict.estimate
    if estimate is None or verdict.confidence is None:
        return None
    unit = "of the logarithm of the ratio" if verdict.unit in _RATIOS else clean(verdict.unit or "")
    half = estimate.half_width(verdict.confidence)
    told = f"standard error {number(estimate.standard_error)} {unit}".rstrip()
    reach = f"an interval at {percent(verdict.confidence)} reaches {number(half)} to each side"
    first = "repeat" if verdict.unit == "ratio of times" else "seed"
    parts = [_part(first, estimate.seed_part, estimate), _part("example", estimate.example_part, estimate)]
    return {
        "form": form_text(verdict.form),
        "text": f"{told}; {reach} ({estimate.degrees_of_freedom:.3g} degrees of freedom)",
        "parts": parts,
    }


def _part(name: str, variance: float | None, estimate: Estimate) -> dict[str, Any]:
    count = estimate.examples if name == "example" else estimate.seeds
    if variance is None:
        return {"name": f"{name} part", "text": "none: it has no part in this", "share": None}
    total = (estimate.seed_part or 0.0) + (estimate.example_part or 0.0)
    share = None if total <= 0 else 100 * variance / total
    counted = f"{count} {name}{'' if count == 1 else 's'}"
    shown = f"variance {number(variance)}" + ("" if share is None else f", {share:.0f} %") + f" ({counted})"
    return {"name": f"{name} part", "text": shown, "share": None if share is None else round(share, 1)}
