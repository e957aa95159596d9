"""One override, or one value of a study, as a change of the configuration; and what is wrong with it by itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import QuotedString

from lora_lab.app.overrides import parse, rewrite_choice
from lora_lab.errors import InputError, Problem, nearest

Groups = Mapping[str, Sequence[str]]

# What other programs call these keys.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target",
    "dtype": "training.precision",
    "tasks": "evaluation.tasks",
    "num_train_epochs": "training.epochs",
    "batch_size": "training.batch_size",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A choice of a group, a value to set, or (`structural`) something only Hydra can apply."""

    key: str
    value: Any
    line: str
    structural: bool

    @property
    def top(self) -> str:
        """The first part of the key."""
        return top(self.key)


def top(key: str) -> str:
    """The first part of a dotted key."""
    return key.partition(".")[0]


def changes_from_text(text: str, groups: Groups) -> list[Change]:
    """The changes that an override of the command line means; raises InputError where it cannot be read."""
    override = parse(text)
    key, line = override.key_or_group, override.input_line or ""
    value = _plain(override.value())
    plain = not (override.is_delete() or override.is_add() or override.is_force_add())
    if override.is_delete() and key in groups:
        raise InputError(Problem(key, f"a choice cannot be taken out; expected one of {', '.join(groups[key])}"))
    if plain and key in groups:
        rewritten = rewrite_choice(key, value, groups[key])
        if rewritten is not None:
            return [change for one in rewritten for change in changes_from_text(one, groups)]
    # Mappings merge and interpolations resolve against the whole: both are left to Hydra.
    structural = not plain or isinstance(value, dict) or "${" in str(value)
    return [Change(key, value, line, structural and not (plain and key in groups))]


def changes_from_value(key: str, value: Any, groups: Groups) -> list[Change]:
    """The changes that a key and a value of a study mean."""
    shown = f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else value
    line = f"{key}={'null' if shown is None else str(shown).lower() if isinstance(shown, bool) else shown}"
    if key in groups or isinstance(value, Mapping):
        return changes_from_text(line, groups)
    return [Change(key, value, line, False)]


def choice_problems(change: Change, groups: Groups) -> Iterator[Problem]:
    """Choices that a group does not have."""
    options = groups.get(change.key)
    if options is None or change.structural:
        return
    for value in change.value if isinstance(change.value, list) else [change.value]:
        if value is None or value == "":
            yield Problem(change.key, f"empty value; expected one of {', '.join(options)}")
        elif str(value) not in options:
            hint = nearest(str(value), list(options))
            modules = "; modules by name are given as a list: target=[q_proj,v_proj]" if change.key == "target" else ""
            yield Problem(change.key, f'no such choice "{value}"{hint}{modules}')


def key_problems(change: Change, mapping: Mapping[str, Any]) -> Iterator[Problem]:
    """An unknown key, with what was probably meant; `mapping` is the configuration that is to be changed."""
    *path, last = change.key.split(".")
    node = value_at(mapping, ".".join(path)) if path else mapping
    if not isinstance(node, Mapping) or last not in node:
        siblings = sorted(node) if isinstance(node, Mapping) else sorted(mapping)
        meant = _meant(last, siblings, mapping, nested=bool(path))
        hint = f'; did you mean "{meant}"?' if meant else ""
        yield Problem(change.key, f"unknown key{hint} (choices: {', '.join(siblings)})")
    elif change.line.startswith("+") and not change.line.startswith("++"):
        yield Problem(change.key, 'is a key already; leave out the "+"')


def _meant(name: str, siblings: Sequence[str], mapping: Mapping[str, Any], *, nested: bool) -> str | None:
    elsewhere = dict(_leaves(mapping, ""))
    for names in (_OTHER_NAMES, elsewhere):
        if name in names:
            return names[name]
    beside = {one: one for one in siblings}
    for names in (beside,) if nested else (beside, _OTHER_NAMES, elsewhere):
        close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
        if close:
            return names[close[0]]
    return None


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Last part of a key -> the whole key."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield str(key), f"{prefix}{key}"


def set_value(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key that exists."""
    *path, last = key.split(".")
    node = value_at(mapping, ".".join(path)) if path else mapping
    node[last] = value


def value_at(mapping: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None."""
    node: Any = mapping
    for step in key.split("."):
        node = node.get(step) if isinstance(node, Mapping) else None
    return node


def _plain(value: Any) -> Any:
    """A parsed value without the parser's own types."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value
