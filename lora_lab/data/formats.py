"""One record of a file or data set -> one Row: the four row formats, and what is wrong with a record. Torch-free."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lora_lab.data.rows import ROLES, Message, Row

Record = Mapping[str, Any]

# Columns that must be there, per format. Order matters for `detect_format`: data sets that hold the finished text
# beside its parts (as Alpaca does) are read by their parts.
REQUIRED: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"chat": (), "instruction": ("input",), "completion": (), "text": ()}

# A NUL cuts strings in C code; a surrogate without its partner has no UTF-8 form, so tokenizers fail on it.
_BROKEN = re.compile("[\x00\ud800-\udfff]")


def detect_format(record: Record) -> str | None:
    """The first format all of whose required columns are there, or None."""
    return next((name for name, columns in REQUIRED.items() if all(column in record for column in columns)), None)


def unknown_format(record: Record) -> str:
    """The message for a first record that fits no format."""
    shapes = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in REQUIRED.items())
    hint = ""
    for column in record:
        close = difflib.get_close_matches(column, [name for names in REQUIRED.values() for name in names], n=1)
        if close:
            hint = f'; did you mean "{close[0]}" by "{column}"?'
            break
    return f"columns of no known format{hint} (found {_names(record)}; formats: {shapes})"


def record_problems(record: Record, row_format: str, *, complete: bool) -> list[str]:
    """What keeps `record` from being a row of `row_format`; empty when nothing does.

    complete: also refuse empty texts and broken characters, as in a file whose owner can mend it.
    """
    missing = [column for column in REQUIRED[row_format] if column not in record]
    if missing:
        return [f"{_names(missing)} missing; found {_names(record)}"]
    if row_format == "chat":
        return _message_problems(record["messages"], complete)
    problems = []
    for column in REQUIRED[row_format]:
        problems += _text_problems(f'"{column}"', record[column], complete)
    for column in OPTIONAL[row_format]:
        if record.get(column) is not None:  # Alpaca-like files write null where there is no input
            problems += _text_problems(f'"{column}"', record[column], False)
            problems += _broken_characters(f'"{column}"', record[column]) if complete else []
    return problems


def type_problems(record: Record, column: str | None) -> list[str]:
    """What keeps `column` of a record from naming its type; nothing where no column is asked for."""
    if column is None:
        return []
    if column not in record:
        return [f'"{column}" (data.type_column) missing; found {_names(record)}']
    return _text_problems(f'"{column}" (data.type_column)', record[column], True)


def row_of(record: Record, row_format: str, source: str, *, row_type: str | None = None) -> Row:
    """The row of a record without `record_problems`; row_type: of one without `type_problems`."""
    row = _MAKERS[row_format](record, source)
    return row if row_type is None else replace(row, type=row_type)


def _instruction(record: Record, source: str) -> Row:
    return Row.from_instruction(record["instruction"], record.get("input") or "", record["output"], source=source)


def _completion(record: Record, source: str) -> Row:
    return Row.from_pair(record["prompt"], record["completion"], source=source)


def _chat(record: Record, source: str) -> Row:
    return Row(tuple(Message(entry["role"], entry["content"]) for entry in record["messages"]), None, source)


def _text(record: Record, source: str) -> Row:
    return Row.from_text(record["text"], source=source)


_MAKERS: dict[str, Callable[[Record, str], Row]] = {
    "instruction": _instruction,
    "completion": _completion,
    "chat": _chat,
    "text": _text,
}


def _message_problems(messages: object, complete: bool) -> list[str]:
    if not isinstance(messages, list):
        return [f'"messages" must be a list of {{role, content}}, got {_shown(messages)}']
    problems = []
    for index, entry in enumerate(messages):
        name = f'"messages"[{index}]'
        if not isinstance(entry, Mapping) or "role" not in entry or "content" not in entry:
            found = _names(entry) if isinstance(entry, Mapping) else _shown(entry)
            problems.append(f"{name} must have role and content, found {found}")
            continue
        if entry["role"] not in ROLES:
            problems.append(f"{name}.role must be one of {', '.join(ROLES)}, got {_shown(entry['role'])}")
        problems += _text_problems(f"{name}.content", entry["content"], complete)
    if not problems and (len(messages) < 2 or messages[-1]["role"] != "assistant"):
        problems.append('"messages" must end with an assistant message that answers an earlier one')
    return problems


def _text_problems(name: str, value: object, complete: bool) -> list[str]:
    if not isinstance(value, str):
        return [f"{name} must be text, got {_shown(value)}"]
    if not complete:
        return []
    if not value.strip():
        return [f"{name} is empty"]
    return _broken_characters(name, value)


def _broken_characters(name: str, value: object) -> list[str]:
    found = _BROKEN.search(value) if isinstance(value, str) else None
    if found is None:
        return []
    kind = "control character" if found.group() == "\x00" else "lone surrogate"
    return [f"{name} holds a {kind} U+{ord(found.group()):04X}"]


def _names(names: Mapping[str, Any] | list[str]) -> str:
    shown = [f'"{name[:60]}"' for name in list(names)[:12]]
    return ", ".join(shown + ["..."] * (len(names) > 12)) or "nothing"


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value!r}"[:60]
    if isinstance(value, str):
        return f'"{value[:60]}"'
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else type(value).__name__
