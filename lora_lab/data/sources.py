"""From a data section to rows: one table, one loader per kind.

A loader imports its module when it is called: `datasets` and `reasoning_gym` take seconds, and counting the rows of a
JSON-lines file for a plan needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_lab.data.jsonl import check_jsonl, load_jsonl
from lora_lab.data.rows import Rows
from lora_lab.schema.data import Data, HubData, JsonlData, SkillsData


def load_rows(data: Data, *, cache: Path) -> Rows:
    """Training and held-out rows of any kind of data; downloads go under `cache`.

    Raises:
        DataError: the data is not usable. MachineError: the hub cannot be reached. IdentityError: the installed
        generator package is another version than declared.
    """
    return _LOADERS[data.kind](data, cache)


def count_train_rows(data: Data) -> int | None:
    """Rows of one epoch without torch and without a network: exact, or None where only loading would tell."""
    if isinstance(data, SkillsData):
        return data.train_size
    if isinstance(data, JsonlData):
        return check_jsonl(data).rows
    return None


def _skills(data: SkillsData, cache: Path) -> Rows:
    from lora_lab.data.skills import load_skills

    return load_skills(data)


def _jsonl(data: JsonlData, cache: Path) -> Rows:
    return load_jsonl(data)


def _hub(data: HubData, cache: Path) -> Rows:
    from lora_lab.data.hub import load_hub

    return load_hub(data, cache=cache)


_LOADERS: dict[str, Callable[[Any, Path], Rows]] = {"skills": _skills, "jsonl": _jsonl, "hub": _hub}
