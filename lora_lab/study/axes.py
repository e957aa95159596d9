"""The axes of a study: what was swept, which settings differ in one axis alone, and what moved along with it.

Keys that vary are taken in order: heads of sections first (`model.name`, `method.kind`, the target as a whole), then
the rest as the schema has them, hashes of weights and texts last. A key is an axis if some two settings differ in it
and agree in every axis before it. All others follow from the axes (alpha where it is 2 rank, double quantization where
only nf4 has it): such a key is no axis, it moves along with one and is named there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lab.plan.readable import target_label
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.adaptation import PARTS, Target
from lora_lab.schema.trial import Trial
from lora_lab.study.settings import is_base, setting_values, varying_keys

_SECTIONS = tuple(Trial.model_fields)
_TARGET = "target"
_TARGET_KEYS = frozenset(f"{_TARGET}.{name}" for name in (*PARTS, "modules"))
# Hashes of weights and texts: they tell settings apart where nothing else does, and say nothing to people.
_IDENTITIES = "identities."
_HEADS = (".name", ".kind")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis. `values`: numbers ascending, all else in order of appearance.

    `matched`: pairs of settings (fingerprints) that differ in this axis alone, the one with the earlier value first. A
    key that one of the two does not have is nothing to differ in.
    """

    name: str
    values: tuple[Any, ...]
    is_numeric: bool
    matched: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Name, values, and how many pairs of settings differ in it alone."""
        return {"name": self.name, "values": list(self.values), "matched": len(self.matched)}


@dataclass(frozen=True, slots=True)
class SweptAxes:
    """`settings`: by fingerprint, the setting's values of the axes that it has. `followers`: the same for varying keys
    that follow from the axes, by dotted key."""

    axes: tuple[Axis, ...]
    settings: dict[str, dict[str, Any]]
    followers: dict[str, dict[str, Any]]

    def along(self, axis: Axis, pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
        """What else differs within some of the pairs, apart from the axis's own section and from hashes."""
        section = axis.name.partition(".")[0]
        moved: set[str] = set()
        for low, high in pairs:
            first, second = self.followers[low], self.followers[high]
            for key in first.keys() & second.keys():
                if first[key] != second[key] and key.partition(".")[0] != section and not key.startswith(_IDENTITIES):
                    moved.add(_short(key))
        return tuple(sorted(moved))

    def to_json(self) -> dict[str, Any]:
        """The axes, and each setting's values of them and of what follows them."""
        return {
            "axes": [axis.to_json() for axis in self.axes],
            "settings": self.settings,
            "followers": self.followers,
        }


def swept_axes(records: Iterable[RunRecord]) -> SweptAxes:
    """The axes among the settings of these runs; untouched bases and runs whose trial cannot be read have no part."""
    rows = _values_by_setting(records)
    keys = sorted(varying_keys(list(rows.values())), key=_precedence)
    differing = {
        key: _differing([row.get(key) for row in rows.values()], [key in row for row in rows.values()]) for key in keys
    }
    moving = _moving_alone(differing, len(rows))
    names = _names(moving)
    return SweptAxes(
        axes=tuple(_axis(names[key], key, rows, alone) for key, alone in moving.items()),
        settings={one: {names[key]: row[key] for key in moving if key in row} for one, row in rows.items()},
        followers={
            one: {key: row[key] for key in keys if key in row and key not in moving} for one, row in rows.items()
        },
    )


def _values_by_setting(records: Iterable[RunRecord]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        header = record.header
        if header is None or is_base(header.trial) or header.setting in rows:
            continue
        hashes = {_IDENTITIES + role: identity for role, identity in header.identities.items()}
        rows[header.setting] = _choices(header.trial) | hashes
    return rows


def _choices(trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values as they were chosen: a target is one choice, known by its name (`qv`), not part by part."""
    values = setting_values(trial)
    kept = {key: value for key, value in values.items() if key not in _TARGET_KEYS}
    if len(kept) == len(values):
        return kept
    parts = dict.fromkeys(PARTS, False) | {"modules": ()} | trial[_TARGET]
    target = Target.model_construct(**parts)
    return kept | {_TARGET: ", ".join([*target.parts, *target.modules]) if target.modules else target_label(target)}


def _precedence(key: str) -> tuple[bool, bool, int, bool]:
    """Sorts the keys that name an axis best to the front; the sort keeps the order of keys that are equal in this."""
    section = key.partition(".")[0]
    is_head = key.endswith(_HEADS) or key == _TARGET
    order = _SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS)
    return (key.startswith(_IDENTITIES), not is_head, order, not key.endswith(".name"))


def _differing(values: Sequence[Any], present: Sequence[bool]) -> NDArray[np.bool_]:
    """Settings x settings: whether both have the key, with different values."""
    seen: dict[str, int] = {}
    codes = np.array([seen.setdefault(json.dumps(value, sort_keys=True), len(seen)) for value in values])
    there = np.array(present)
    differing: NDArray[np.bool_] = (codes[:, None] != codes) & there[:, None] & there
    return differing


def _moving_alone(differing: Mapping[str, NDArray[np.bool_]], count: int) -> dict[str, NDArray[np.bool_]]:
    """The keys that are axes, each with the pairs of settings that differ in it and in no other axis (maybe none)."""
    differences = np.zeros((count, count), dtype=np.int16)
    kept: dict[str, NDArray[np.bool_]] = {}
    for key, one in differing.items():
        if (one & (differences == 0)).any():
            kept[key] = one
            differences += one
    return {key: one & (differences == 1) for key, one in kept.items()}


def _axis(name: str, key: str, rows: Mapping[str, Mapping[str, Any]], alone: NDArray[np.bool_]) -> Axis:
    values: list[Any] = []
    for row in rows.values():
        if key in row and row[key] not in values:
            values.append(row[key])
    is_numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if is_numeric:
        values.sort()
    settings = list(rows)
    places = {setting: values.index(row[key]) for setting, row in rows.items() if key in row}
    pairs = [(settings[i], settings[j]) for i, j in np.argwhere(alone)]
    matched = tuple((low, high) for low, high in pairs if places[low] < places[high])
    return Axis(name, tuple(values), is_numeric, matched)


def _names(keys: Iterable[str]) -> dict[str, str]:
    """Short names, where they are not taken twice."""
    short = {key: _short(key) for key in keys}
    taken = Counter(short.values())
    return {key: name if taken[name] == 1 else key for key, name in short.items()}


def _short(key: str) -> str:
    return key.removesuffix(".name").removesuffix(".kind")
