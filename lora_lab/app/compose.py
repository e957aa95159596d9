"""From overrides to plain mappings. Below this file there is no OmegaConf.

Hydra composes once (about 0.14 s). Choices of groups are then made by merging their leaves (`app.leaves`; Hydra is
asked again only where a leaf is more than values), and values are set on the plain mapping. That gives what full
composition gives (tests/contract/test_compose.py) and makes 500 trials a matter of milliseconds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lora_lab.app.changes import (
    Change,
    changes_from_text,
    changes_from_value,
    choice_problems,
    key_problems,
    set_value,
    top,
)
from lora_lab.app.interpolation import first_line, hidden_keys, plain_mapping
from lora_lab.app.leaves import PlainLeaves
from lora_lab.app.locations import conf_folder
from lora_lab.errors import InputError, Problem

_Composed = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Composition:
    """One point: the whole configuration as a plain mapping, and the overrides that led to it.

    problems: what was wrong with them; such overrides are left out of `mapping`, and `doubtful` are the top-level keys
    they were about. places: `file:line:column` by key, for values that stand in a study file. hidden: how keys whose
    value comes from an environment variable were written; their values are never shown.
    """

    mapping: Mapping[str, Any]
    overrides: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    doubtful: frozenset[str] = frozenset()
    places: Mapping[str, str] = field(default_factory=dict)
    hidden: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Findings:
    """What is wrong with a point, and the top-level keys about which nothing more can be said."""

    problems: list[Problem] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)

    def add(self, problems: Iterable[Problem]) -> bool:
        found = list(problems)
        self.problems += found
        self.doubtful |= {top(problem.where) for problem in found}
        return bool(found)


def config_loader(*, primary: Path | None = None, extra: Path | None = None) -> ConfigLoader:
    """Hydra's loader on the lab's own conf/ (or on `primary`); `extra` is a folder of more leaves (`--config-dir`)."""
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    search_path = create_config_search_path(f"file://{primary or conf_folder()}")
    if extra is not None:
        before = SearchPathQuery(provider="schema")
        search_path.prepend(provider="command-line", path=f"file://{extra.absolute()}", anchor=before)
    made = Hydra.create_main_hydra2(task_name="lora-lab", config_search_path=search_path)
    loader: ConfigLoader = made.config_loader
    GlobalHydra.instance().clear()
    return loader


class Composer:
    """Composes points on top of a master configuration, which carries Hydra's own overrides."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._groups = {
            group: sorted(loader.get_group_options(group)) for group in loader.list_groups("") if group != "hydra"
        }
        self._leaves = PlainLeaves(loader, master)
        self._composed: dict[tuple[str, ...], _Composed] = {}

    def compose(self, overrides: Sequence[str], *, under: Mapping[str, Any] | None = None) -> Composition:
        """One point. `under`: values of a study, applied before the command line's overrides, which win.

        Raises:
            InputError: listing every unknown key, unknown choice and failed interpolation of this point.
        """
        composition = self.attempt(overrides, under=under)
        if composition.problems:
            raise InputError(composition.problems)
        return composition

    def attempt(self, overrides: Sequence[str], *, under: Mapping[str, Any] | None = None) -> Composition:
        """Like `compose`, but what is wrong is in the result, beside what is right."""
        found = _Findings()
        below = self._read(found, changes_from_value, (under or {}).items())
        own = self._read(found, changes_from_text, ((text,) for text in overrides))
        changes = [change for change in below if change.key not in {one.key for one in own}] + own
        # Keys below a choice that does not exist cannot be judged.
        unknown = {one.key for one in changes if found.add(choice_problems(one, self._groups))}
        changes = [one for one in changes if one.top not in unknown]
        choices = [one for one in changes if one.key in self._groups and not one.structural]
        mapping, hidden = copy.deepcopy(self._with_hydra(changes, choices, found))
        for one in changes:
            if one in choices or one.structural or found.add(key_problems(one, mapping)):
                continue
            set_value(mapping, one.key, one.value)
            hidden.pop(one.key, None)
        found.add(_missing(mapping, ""))
        return Composition(
            mapping=mapping,
            overrides=tuple(one.line for one in changes),
            problems=tuple(dict.fromkeys(found.problems)),
            doubtful=frozenset(found.doubtful),
            hidden=hidden,
        )

    def _read(
        self, found: _Findings, read: Callable[..., list[Change]], sources: Iterable[tuple[Any, ...]]
    ) -> list[Change]:
        changes: list[Change] = []
        for source in sources:
            try:
                changes += read(*source, self._groups)
            except InputError as error:
                found.add(error.problems)
        return changes

    def _with_hydra(self, changes: Sequence[Change], choices: Sequence[Change], found: _Findings) -> _Composed:
        """What only Hydra can apply; as much of it as can be applied."""
        try:
            plain = self._compose_choices(choices)
        except InputError as error:
            found.add(error.problems)
            found.doubtful |= {one.key for one in choices}
            plain = self._compose_with_hydra(())
        structural = [one for one in changes if one.structural]
        wrong = [one for one in structural if not _may_be_new(one) and found.add(key_problems(one, plain[0]))]
        lines = [one for one in changes if one in choices or (one.structural and one not in wrong)]
        if len(lines) == len(choices) or found.doubtful & {one.key for one in choices}:
            return plain
        try:
            return self._compose_with_hydra(tuple(one.line for one in lines))
        except InputError as error:
            found.add(error.problems)
            found.doubtful |= {one.top for one in structural}
            return plain

    def _compose_choices(self, choices: Sequence[Change]) -> _Composed:
        lines = tuple(one.line for one in choices)
        if lines not in self._composed and choices:
            base, hidden = self._compose_with_hydra(())
            combined = self._leaves.combine(base, choices)
            if combined is not None:
                self._composed[lines] = combined, hidden
        return self._compose_with_hydra(lines)

    def _compose_with_hydra(self, lines: tuple[str, ...]) -> _Composed:
        if lines not in self._composed:
            try:
                config = self._loader.load_sweep_config(self._master, list(lines))
                self._composed[lines] = plain_mapping(config), hidden_keys(config)
            except (HydraException, OmegaConfBaseException) as error:
                raise InputError(_hydra_problem(error, lines)) from None
        return self._composed[lines]


def _may_be_new(change: Change) -> bool:
    """`++` adds an entry to a mapping such as data.mixture; what cannot be one is refused by the schema."""
    return change.line.startswith("++") and "." in change.key


def _hydra_problem(error: BaseException, lines: Sequence[str]) -> Problem:
    """Hydra names the key it could not override in quotes."""
    text = first_line(error)
    named = re.search(r"override '([^']+)'", text)
    where = named.group(1) if named else " ".join(lines)
    return Problem(where, text.replace("Could not override", "cannot change"))


def _missing(node: Mapping[str, Any], prefix: str) -> list[Problem]:
    """Keys whose leaf says `???`: the user must give them."""
    problems = []
    for key, value in node.items():
        where = f"{prefix}{key}"
        if isinstance(value, Mapping):
            problems += _missing(value, f"{where}.")
        elif value == "???":
            problems.append(Problem(where, f"a value is needed: {where}=..."))
    return problems
