"""From overrides to plain mappings. Below this file there is no OmegaConf.

Hydra composes once per distinct choice of groups (about 0.14 s each); values are then set on the plain mapping, which
gives what full composition gives (tests/contract/test_compose.py) and makes 500 trials a matter of milliseconds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.app.locations import conf_folder
from lora_lab.app.overrides import parse, rewrite_choice
from lora_lab.errors import InputError, Problem, nearest


@dataclass(frozen=True, slots=True)
class Composition:
    """One point: the whole configuration as a plain mapping, and the overrides that led to it."""

    mapping: Mapping[str, Any]
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Change:
    """One override: a choice of a group, a value to set, or (`structural`) something only Hydra can apply."""

    key: str
    value: Any
    line: str
    structural: bool


def config_loader() -> ConfigLoader:
    """Hydra's loader on the lab's own conf/."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        loader: ConfigLoader = GlobalHydra.instance().config_loader()
    return loader


class Composer:
    """Composes points on top of a master configuration, which carries Hydra's own overrides."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._groups = {
            group: sorted(loader.get_group_options(group)) for group in loader.list_groups("") if group != "hydra"
        }
        self._composed: dict[tuple[str, ...], dict[str, Any]] = {}

    def compose(self, overrides: Sequence[str], *, under: Mapping[str, Any] | None = None) -> Composition:
        """One point. `under`: values of a study, applied before the command line's overrides, which win.

        Raises:
            InputError: listing every unknown key, unknown choice and failed interpolation of this point.
        """
        changes = [change for key, value in (under or {}).items() for change in self._from_value(key, value)]
        own = [change for text in overrides for change in self._from_override(parse(text))]
        changes = [change for change in changes if change.key not in {one.key for one in own}] + own
        self._check_choices(changes)
        hydra_lines = tuple(one.line for one in changes if one.structural or one.key in self._groups)
        mapping = copy.deepcopy(self._compose_with_hydra(hydra_lines))
        problems = [problem for one in changes if one.line not in hydra_lines for problem in _set(mapping, one)]
        problems += _missing(mapping, "")
        if problems:
            raise InputError(problems)
        return Composition(mapping, tuple(one.line for one in changes))

    def _from_override(self, override: Override) -> list[_Change]:
        key, line = override.key_or_group, override.input_line or ""
        value = override.value()
        plain = not (override.is_delete() or override.is_add() or override.is_force_add() or override.package)
        if plain and key in self._groups:
            rewritten = rewrite_choice(key, value, self._groups[key])
            if rewritten is not None:
                return [change for text in rewritten for change in self._from_override(parse(text))]
        if override.is_add() and not key.startswith("hydra"):
            raise InputError(Problem(key, "unknown key" + nearest(key, self._known_keys(key))))
        # Mappings merge and interpolations resolve against the whole: both are left to Hydra.
        structural = not plain or isinstance(value, dict) or "${" in line
        return [_Change(key, _plain(value), line, structural and key not in self._groups)]

    def _from_value(self, key: str, value: Any) -> list[_Change]:
        shown = f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else value
        line = f"{key}={'null' if shown is None else str(shown).lower() if isinstance(shown, bool) else shown}"
        if key in self._groups or isinstance(value, Mapping):
            return self._from_override(parse(line))
        return [_Change(key, value, line, False)]

    def _known_keys(self, key: str) -> list[str]:
        node: Any = self._compose_with_hydra(())
        for step in key.split(".")[:-1]:
            node = node.get(step) if isinstance(node, Mapping) else None
        return sorted(node) if isinstance(node, Mapping) else sorted(self._compose_with_hydra(()))

    def _check_choices(self, changes: Sequence[_Change]) -> None:
        problems = []
        for change in changes:
            options = self._groups.get(change.key)
            if options is None or change.structural:
                continue
            chosen = change.value if isinstance(change.value, list) else [change.value]
            for value in chosen:
                if value is None or value == "":
                    problems.append(Problem(change.key, f"empty value; expected one of {', '.join(options)}"))
                elif str(value) not in options:
                    problems.append(Problem(change.key, f'no such choice "{value}"' + nearest(str(value), options)))
        if problems:
            raise InputError(problems)

    def _compose_with_hydra(self, lines: tuple[str, ...]) -> dict[str, Any]:
        if lines not in self._composed:
            try:
                config = self._loader.load_sweep_config(self._master, list(lines))
                self._composed[lines] = plain_mapping(config)
            except (HydraException, OmegaConfBaseException) as error:
                raise InputError(Problem(" ".join(lines), _first_line(error))) from None
        return self._composed[lines]


def plain_mapping(config: DictConfig) -> dict[str, Any]:
    """A composed configuration without Hydra's own node, every interpolation resolved.

    Raises:
        InputError: naming the key whose interpolation fails; values of other environment variables are never shown.
    """
    without_hydra = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        mapping = OmegaConf.to_container(without_hydra, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        text = _first_line(error)
        if "Recursive" in text:
            text = f"interpolations in a circle: {' -> '.join(_circle(without_hydra, key))}"
        raise InputError(Problem(key, text)) from None
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items()}


def _circle(config: DictConfig, start: str) -> list[str]:
    """The keys that refer to each other, from `start` until one comes again."""
    chain = [start]
    while match := re.search(r"\$\{([\w.]+)\}", str(_unresolved(config, chain[-1]))):
        chain.append(match.group(1))
        if chain[-1] in chain[:-1]:
            break
    return chain


def _unresolved(config: DictConfig, key: str) -> Any:
    node: Any = OmegaConf.to_container(config, resolve=False)
    for step in key.split("."):
        node = node.get(step) if isinstance(node, dict) else None
    return node


def _first_line(error: BaseException) -> str:
    cause = error.__cause__
    text = str(error).splitlines()[0]
    return f"{text}: {str(cause).splitlines()[0]}" if cause is not None and str(cause) else text


def _plain(value: Any) -> Any:
    """A parsed value without the parser's own types."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


def _set(mapping: dict[str, Any], change: _Change) -> list[Problem]:
    """Sets one existing key; an unknown one is a problem that names the nearest."""
    node: Any = mapping
    *path, last = change.key.split(".")
    for step in path:
        node = node.get(step) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        known = sorted(node) if isinstance(node, dict) else sorted(mapping)
        return [Problem(change.key, "unknown key" + nearest(last, known))]
    node[last] = change.value
    return []


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
