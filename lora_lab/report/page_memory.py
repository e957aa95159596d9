"""What the page of a run says of its predicted memory: the peak beside the measured one, and part by part."""

from __future__ import annotations

from typing import Any

from lora_lab.record.predicted_peak import FACT
from lora_lab.record.result import Result
from lora_lab.report.memory_words import peak_sentence, percent_text
from lora_lab.report.text import UNKNOWN, bytes_text, clean
from lora_lab.study.predicted_memory import PartPair, part_pairs

_TITLES = ("part of the peak", "predicted", "measured", "error")
_LEAD = "Of gradients, activations and temporary bytes only the sum is known: what the measured peak has on top."


def memory_view(result: Result) -> dict[str, Any] | None:
    """Sentence, titles, rows and notes; None where nothing was predicted. No rows where no parts were kept."""
    sentence = peak_sentence(result)
    if sentence is None:
        return None
    pairs = part_pairs(result)
    return {
        "sentence": f"{sentence[0].upper()}{sentence[1:]}.",
        "lead": _LEAD if any(pair.measured_bytes is not None for pair in pairs) else "",
        "titles": _TITLES,
        "rows": [_row(pair) for pair in pairs],
        "notes": _notes(result),
    }


def _row(pair: PartPair) -> list[str]:
    predicted, measured = pair.predicted_bytes, pair.measured_bytes
    error = percent_text((predicted - measured) / measured) if measured else UNKNOWN
    title = f"of it {pair.title}" if pair.is_detail else pair.title
    return [title, bytes_text(predicted), bytes_text(measured), error]


def _notes(result: Result) -> list[str]:
    """Where in the step the peak was expected, how it was predicted, and what was assumed; as far as it was kept."""
    told = result.facts.get(FACT)
    if not isinstance(told, dict):
        return []
    parts = [
        f"{name}: {told[key]}" for name, key in (("where", "place"), ("how", "how"), ("rows", "rows")) if key in told
    ]
    notes = told.get("notes")
    listed = [str(note) for note in notes] if isinstance(notes, (list, tuple)) else []
    return [clean(text) for text in ([f"{'; '.join(parts)}."] if parts else []) + listed]
