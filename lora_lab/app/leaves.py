"""Choices whose leaf fills nothing but its own group, merged here exactly as Hydra merges them.

A sweep over groups has as many compositions as it has combinations of choices, and Hydra takes about 0.14 s for each. A
plain leaf (no `defaults`, no `@package`, no `${...}`) only adds its values to its group's section, so a combination of
plain leaves is put together from the leaves themselves; everything else is left to Hydra.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from lora_lab.app.changes import Change
from lora_lab.app.locations import conf_folder

_PRIMARY = "config"


class PlainLeaves:
    """Combines plain leaves of the lab's own conf/ on top of the configuration without overrides."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._folder = conf_folder()
        primary = OmegaConf.load(self._folder / f"{_PRIMARY}.yaml")
        assert isinstance(primary, DictConfig)
        self._sections = primary
        self._leaves: dict[tuple[str, str], DictConfig | None] = {}
        self._is_usable = self._only_plain_defaults(loader, master)

    def combine(self, base: Mapping[str, Any], choices: Sequence[Change]) -> dict[str, Any] | None:
        """`base` with the sections of all `choices` replaced; None where one of them is not plain."""
        if not self._is_usable:
            return None
        sections: dict[str, Any] = {}
        for choice in choices:
            names = choice.value if isinstance(choice.value, list) else [choice.value]
            leaves = [self._leaf(choice.key, str(name)) for name in names]
            if any(leaf is None for leaf in leaves):
                return None
            own = self._sections.get(choice.key) or {}
            sections[choice.key] = OmegaConf.to_container(OmegaConf.merge(own, *leaves))
        return {**copy.deepcopy(dict(base)), **sections}

    def _leaf(self, group: str, name: str) -> DictConfig | None:
        if (group, name) not in self._leaves:
            self._leaves[group, name] = _plain_content(self._folder / group / f"{name}.yaml")
        return self._leaves[group, name]

    def _only_plain_defaults(self, loader: ConfigLoader, master: DictConfig) -> bool:
        """Whether nothing but plain leaves and the lab's own primary configuration made the master.

        A user's configuration may change a section after its leaf was merged; then the order is Hydra's business.
        """
        folders = [source.path for source in loader.get_sources() if source.scheme() == "file"]
        if folders != [str(self._folder)] or master.hydra.job.config_name != _PRIMARY:
            return False
        choices = {key: name for key, name in master.hydra.runtime.choices.items() if not key.startswith("hydra/")}
        return all(
            self._leaf(group, str(name)) is not None or _adds_nothing(self._folder / group / f"{name}.yaml")
            for group, name in choices.items()
        )


def _plain_content(path: Path) -> DictConfig | None:
    if not path.is_file() or "# @package" in (text := path.read_text()) or "${" in text:
        return None
    content = OmegaConf.load(path)
    return content if isinstance(content, DictConfig) and "defaults" not in content else None


def _adds_nothing(path: Path) -> bool:
    """An empty leaf, or the optional one of a machine (conf/local) that is not there."""
    return not path.is_file() or not OmegaConf.load(path)
