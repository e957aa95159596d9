"""Which settings of a table have no time, or no memory, to compare, because none of their runs was made alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

TIME, MEMORY = "train_seconds", "peak_allocated_bytes"


class _Row(Protocol):
    """What is asked of a `SettingRow`."""

    @property
    def name(self) -> str: ...
    @property
    def is_base(self) -> bool: ...
    @property
    def completed(self) -> int: ...
    @property
    def runs_alone(self) -> int: ...
    @property
    def last_repeat(self) -> int: ...
    @property
    def cost(self) -> Mapping[str, float | int]: ...


@dataclass(frozen=True, slots=True)
class NotAlone:
    """Of `of` trained settings with completed runs, `settings` (names; `runs` completed runs in all) lack the
    measurement `cost` for want of a run made alone. A sweep with `repeat` makes one for each of them."""

    cost: str
    settings: tuple[str, ...]
    runs: int
    of: int
    repeat: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {**asdict(self), "settings": list(self.settings)}


def not_alone(rows: Iterable[_Row]) -> tuple[NotAlone, ...]:
    """For time and for memory, the settings without a run made alone; nothing for a cost that none of them lacks."""
    able = [row for row in rows if row.completed and not row.is_base]
    found = []
    for cost in (TIME, MEMORY):
        lacking = [row for row in able if not row.runs_alone and cost not in row.cost]
        if lacking:
            repeat = 1 + max(row.last_repeat for row in lacking)
            names = tuple(row.name for row in lacking)
            found.append(NotAlone(cost, names, sum(row.completed for row in lacking), len(able), repeat))
    return tuple(found)
