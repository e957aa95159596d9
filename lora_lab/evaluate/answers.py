"""What a model answers to the first held-out prompts, to be read beside the numbers. Nothing is scored on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.adapters.prompts import context_limit, virtual_tokens
from lora_lab.data.encode import prompt_ids, stop_ids
from lora_lab.data.rows import Row
from lora_lab.errors import DataError
from lora_lab.models.generate import Generated, generate
from lora_lab.record.run_record import ANSWERS_FILE
from lora_lab.schema.evaluation import SampleAnswers


def write_answers(
    model: Any, tokenizer: Any, rows: Sequence[Row], settings: SampleAnswers, *, template: str, output: Path
) -> str | None:
    """Greedy answers to the last turn of the first `settings.rows` rows with a prompt, one JSON line each.

    A line has index (position among the held-out rows), prompt (the last user message), expected, answer, and
    is_complete: false where `settings.max_new_tokens` or the model's context ended it. Returns why there are none, or
    None.
    """
    chosen = [(index, row) for index, row in enumerate(rows) if row.messages is not None][: settings.rows]
    if not chosen:
        return "the held-out rows are plain text, without prompts" if settings.rows else "not asked for"
    stops = stop_ids(tokenizer, template)
    lines = []
    for index, row in chosen:
        try:
            ids = prompt_ids(row, tokenizer, template)
        except DataError as error:
            return str(error)
        text = _answer(model, tokenizer, ids, max_new_tokens=settings.max_new_tokens, stop_ids=stops)
        lines.append(
            {
                "index": index,
                "prompt": row.content[-2][1],
                "expected": row.answer,
                "answer": text.text,
                "is_complete": text.is_complete,
            }
        )
    output.mkdir(parents=True, exist_ok=True)
    text_lines = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    (output / ANSWERS_FILE).write_text(text_lines, encoding="utf-8")
    return None


def _answer(
    model: Any, tokenizer: Any, ids: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Generated:
    """Never beyond the model's positions, which a table of positions (GPT-2) does not have; empty without room."""
    limit = context_limit(model)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - virtual_tokens(model) - len(ids))
    if room < 1:
        return Generated("", False)
    return generate(model, tokenizer, ids, max_new_tokens=room, stop_ids=stop_ids)
