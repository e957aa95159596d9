"""Hydra's own part of the configuration: loaded first, and kept to what runs nothing and writes nowhere."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.app.compose import config_loader
from lora_lab.app.flags import folder_problems
from lora_lab.app.interpolation import first_line
from lora_lab.app.locations import conf_folder
from lora_lab.errors import InputError, Problem, nearest

OWN_LAUNCHER = "lora_lab"
_SEARCH_PATH = "hydra.searchpath"
_PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
_PLUGIN_MODULES = ("hydra_plugins.", "hydra._internal.core_plugins.")
# What a user's configuration file may not set either: where Hydra writes, and which classes it makes.
_CLOSED = ("run", "sweep", "output_subdir", "job_logging", "hydra_logging", "callbacks")


def plugin_problems(overrides: Sequence[Override], loader: ConfigLoader) -> list[Problem]:
    """Launchers and sweepers that are not installed, and folders of `hydra.searchpath` that cannot be read."""
    problems = []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key in _PLUGIN_GROUPS and str(value) not in (options := loader.get_group_options(key)):
            problems.append(Problem(key, f'no such choice "{value}"' + nearest(str(value), sorted(options))))
        if key == _SEARCH_PATH and not isinstance(value, list):
            problems.append(Problem(key, f"expected a list of folders as [file://FOLDER], got {value}"))
        elif key == _SEARCH_PATH:
            folders = [str(one).removeprefix("file://") for one in value if not str(one).startswith("pkg://")]
            problems += [one for folder in folders for one in folder_problems(folder, where=key)]
    return problems


def load_master(loader: ConfigLoader, flags: argparse.Namespace, lines: list[str]) -> DictConfig:
    """The configuration that points are composed on; `lines` are the overrides of Hydra's own settings.

    Raises:
        InputError: no such configuration, unreadable files, or settings that are not open to users.
    """
    name = flags.config_name or "config"
    mode = RunMode.MULTIRUN if flags.multirun else RunMode.RUN
    try:
        master: DictConfig = loader.load_configuration(name, lines, mode)
    except (HydraException, OmegaConfBaseException) as error:
        folders = [conf_folder() if flags.config_path is None else Path(flags.config_path), flags.config_dir]
        names = sorted(file.stem for folder in folders if folder is not None for file in Path(folder).glob("*.yaml"))
        if name not in names:
            raise InputError(Problem("--config-name", f'no configuration "{name}"' + nearest(name, names))) from None
        raise InputError(first_line(error)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(" ".join(str(error).split())) from None
    if (
        flags.config_name
        or flags.config_dir
        or flags.config_path
        or any(line.startswith(_SEARCH_PATH) for line in lines)
    ):
        problems = list(_setting_problems(master))
        if problems:
            raise InputError(problems)
    return master


def is_multirun(master: DictConfig, flags: argparse.Namespace) -> bool:
    """Whether the call is a sweep: by `-m`, or by hydra.mode."""
    return bool(flags.multirun or master.hydra.mode == RunMode.MULTIRUN)


def swept_by_settings(master: DictConfig) -> list[str]:
    """`hydra.sweeper.params: {rank: 2,4}` is another way to write the override rank=2,4."""
    params = OmegaConf.select(master, "hydra.sweeper.params")
    return [f"{key}={value}" for key, value in (params or {}).items()]


def launches_one_by_one(master: DictConfig) -> bool:
    """Whether another launcher than the lab's was chosen, which starts with the first point."""
    return bool(OmegaConf.select(master, "hydra.runtime.choices")["hydra/launcher"] != OWN_LAUNCHER)


def _setting_problems(master: DictConfig) -> Iterator[Problem]:
    own = config_loader().load_configuration("config", [], RunMode.RUN)
    for key in _CLOSED:
        if _plain(master, key) != _plain(own, key):
            yield Problem(f"hydra.{key}", "not open to users: the lab writes below root=DIR only; leave it as it is")
    for key in ("launcher", "sweeper"):
        for where, target in _targets(_plain(master, key), f"hydra.{key}"):
            if where.count(".") > 2 or not str(target).startswith(_PLUGIN_MODULES):
                yield Problem(where, "configuration holds values only; nothing is instantiated from it")


def _plain(config: DictConfig, key: str) -> Any:
    node = config.hydra[key]
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _targets(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield f"{prefix}.{key}", value
            else:
                yield from _targets(value, f"{prefix}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{prefix}.{index}")
