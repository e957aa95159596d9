"""Names and differences for people: a short label per trial, and the keys in which trials differ."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_lab.schema.adaptation import PARTS, Target
from lora_lab.schema.trial import Trial

_NAMED_TARGETS = {
    frozenset({"query", "value"}): "qv",
    frozenset({"query", "key", "value", "projection"}): "attention",
    frozenset({"mlp"}): "mlp",
    frozenset({"query", "key", "value", "projection", "mlp"}): "all_linear",
    frozenset({"query", "key", "value", "projection", "mlp", "head"}): "all_linear_head",
    frozenset({"embedding"}): "embedding",
    frozenset({"key", "value", "mlp"}): "kvm",
}


_PARENT_DIGITS = 8
_SEED_IN_NAME = re.compile(r"-s\d+$")


class Absent(enum.StrEnum):
    """Stands in a difference for a key that one of the two trials does not have."""

    ABSENT = "(absent)"


ABSENT = Absent.ABSENT


def readable_name(trial: Trial, *, parent: str | None = None) -> str:
    """A label such as `lora-nf4dq-r8-qv-s1`, `full-s0` or `base`. Not unique: the fingerprint is.

    parent: fingerprint of the run it starts from, told by its first digits (`lora-r8-qv-from0a1b2c3d-s0`): else a child
    could bear the name of its parent, which would then name two runs.
    """
    facts: list[str] = [trial.method.kind]
    if trial.quantization.kind != "none":
        facts.append(trial.quantization.kind + ("dq" if trial.quantization.double_quantization else ""))
    if "rank" in trial.method.uses:
        facts.append(f"r{trial.rank}")
    if "target" in trial.method.uses:
        facts.append(target_label(trial.target))
    if parent is not None:
        facts.append(f"from{parent[:_PARENT_DIGITS]}")
    if trial.method.kind != "base":
        facts.append(f"s{trial.seed}")
    return "-".join(facts)


def without_seed(name: str) -> str:
    """The label of a trial's setting: `lora-r8-qv` of `lora-r8-qv-s1`."""
    return _SEED_IN_NAME.sub("", name)


def target_label(target: Target) -> str:
    """The name of the set, else the initials of its parts (`qkp`), else `custom` where modules are named."""
    if target.modules:
        return "custom"
    named = _NAMED_TARGETS.get(frozenset(target.parts))
    return named if named is not None else "".join(part[0] for part in PARTS if part in target.parts)


def difference(a: Trial, b: Trial) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the value in `a` and in `b`; ABSENT where one has no such key.

    A seed of `seeds` that only follows `seed` in both trials is left out.
    """
    return {key: (values[0], values[1]) for key, values in _columns([a, b]).items() if values[0] != values[1]}


def varying_keys(trials: Sequence[Trial]) -> list[str]:
    """Dotted keys that do not have one and the same value in all trials, in the order of the schema."""
    return [key for key, values in _columns(trials).items() if any(value != values[0] for value in values)]


def _columns(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """key -> its value in each trial."""
    rows = [dict(_flat(trial.model_dump(mode="json"), prefix="")) for trial in trials]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: [row.get(key, ABSENT) for row in rows] for key in keys}
    seeds = columns["seed"] if rows else []
    return {key: column for key, column in columns.items() if not (key.startswith("seeds.") and column == seeds)}


def _flat(node: Mapping[str, Any], *, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
