"""How settings are told apart for people: the keys that vary, and a name that is short and unique within a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.plan.readable import without_seed
from lora_lab.record.flat import dotted
from lora_lab.schema.method import METHODS

# The keys whose values make trials of one setting differ.
_SEEDS = re.compile(r"seed|seeds\..*")
_AXES = {axis: re.compile(rf"{axis}($|\.)") for axis in ("rank", "alpha", "dropout", "target")}
_OF_BASE = re.compile(r"(model|method|quantization|data|evaluation)\.|training\.precision$")
ABSENT = "(absent)"


def is_base(trial: Mapping[str, Any]) -> bool:
    """Whether nothing is trained: row zero of a study."""
    return bool(trial["method"]["kind"] == "base")


def setting_values(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a trial without its seeds, and without what its method does not use: of an untouched base only
    what it depends on, of full fine-tuning no rank."""
    flat = {key: value for key, value in dotted(trial).items() if not _SEEDS.fullmatch(key)}
    if is_base(trial):
        return {key: value for key, value in flat.items() if _OF_BASE.match(key)}
    uses = METHODS[trial["method"]["kind"]].uses
    unused = [pattern for axis, pattern in _AXES.items() if axis not in uses]
    return {key: value for key, value in flat.items() if not any(pattern.match(key) for pattern in unused)}


def varying_keys(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with more than one value among the settings that have them, in order of appearance."""
    keys = list(dict.fromkeys(key for one in values for key in one))
    present = {key: [one[key] for one in values if key in one] for key in keys}
    return [key for key, found in present.items() if any(value != found[0] for value in found)]


def unique_names(names: Sequence[str], values: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> list[str]:
    """A name per setting: the run's without its seed, and what differs where several settings would share it."""
    bare = [without_seed(name) for name in names]
    result = list(bare)
    for shared in {name for name in bare if bare.count(name) > 1}:
        members = [index for index, name in enumerate(bare) if name == shared]
        keys = _telling(varying_keys([values[index] for index in members]))
        for index in members:
            told = [f"{_short(key)}={_shown(values[index].get(key, ABSENT))}" for key in keys]
            result[index] = " ".join([shared, *told])
    return [
        name if result.count(name) == 1 else f"{name} [{setting[:8]}]"
        for name, setting in zip(result, settings, strict=True)
    ]


def _telling(keys: Sequence[str]) -> list[str]:
    """Of a section whose `name` or `kind` varies only that key: the others follow from it."""
    heads = {key.rpartition(".")[0] for key in keys if key.endswith((".name", ".kind"))}
    kept: list[str] = []
    told: set[str] = set()
    for key in keys:
        section = key.partition(".")[0]
        if section not in heads:
            kept.append(key)
        elif section not in told:
            told.add(section)
            kept.append(f"{section}.name" if f"{section}.name" in keys else f"{section}.kind")
    return kept


def _short(key: str) -> str:
    return key.removesuffix(".name").removesuffix(".kind")


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
