"""Step records as columns of numbers, so that a checkpoint holds a long training's in a few kilobytes a thousand steps.

One tensor per field and auxiliary loss: int64 where all are integers, else float64, which gives every number back to
the last bit. What was not measured (None) is NaN there: a finished step has no other NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lab.train.member import StepRecord

_AUXILIARY = "auxiliary"
_FIELDS = tuple(name for name in StepRecord.__dataclass_fields__ if name != _AUXILIARY)


def columns_of(records: Sequence[StepRecord]) -> dict[str, Tensor]:
    """Column of every field, and `auxiliary/NAME` of every auxiliary loss; each [records].

    Raises:
        ValueError: records of one training with different auxiliary losses.
    """
    names = list(records[0].auxiliary) if records else []
    if any(list(record.auxiliary) != names for record in records):
        raise ValueError("step records with different auxiliary losses")
    columns = {name: _column([getattr(record, name) for record in records]) for name in _FIELDS}
    columns |= {f"{_AUXILIARY}/{name}": _column([record.auxiliary[name] for record in records]) for name in names}
    return columns


def _column(values: Sequence[float | int | None]) -> Tensor:
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def misfits(columns: Mapping[str, Tensor]) -> list[str]:
    """Why these are not the columns of step records."""
    fields = [name for name in columns if not name.startswith(f"{_AUXILIARY}/")]
    if sorted(fields) != sorted(_FIELDS):
        return [f"step records of {', '.join(sorted(fields))}; expected {', '.join(sorted(_FIELDS))}"]
    if len({tuple(column.shape) for column in columns.values()}) > 1:
        return ["step records of different lengths"]
    return []


def records_of(columns: Mapping[str, Tensor]) -> list[StepRecord]:
    """The records that `columns_of` was given; `columns` has no misfits."""
    lists: dict[str, list[Any]] = {name: _values(column) for name, column in columns.items()}
    names = [name for name in lists if name not in _FIELDS]
    return [
        StepRecord(
            **{name: lists[name][index] for name in _FIELDS},
            auxiliary={name.partition("/")[2]: lists[name][index] for name in names},
        )
        for index in range(len(lists[_FIELDS[0]]))
    ]


def _values(column: Tensor) -> list[Any]:
    values: list[Any] = column.tolist()
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]
