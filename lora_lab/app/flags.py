"""Hydra's flags (`-m`, `-cn`, `--cfg`, ...), read so that they may stand before, between and after the overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser

from lora_lab.app.own_flags import OWN_FLAGS
from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.paths import existing
from lora_lab.plan.strict_yaml import read_yaml

_MODES = ("run", "multirun", "cfg", "info", "shell_completion")


def parse_flags(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The flags and `overrides` of a command line.

    Raises:
        InputError: an unknown flag (with the nearest), a flag without its value, flags that exclude each other.
    """
    parser = get_args_parser()
    parser.prog = f"lora-lab {command}"
    parser.exit_on_error = False
    try:
        flags, unknown = parser.parse_known_intermixed_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(Problem(str(error.argument_name), error.message)) from None
    known = sorted({*parser._option_string_actions, *OWN_FLAGS})
    problems = [Problem(one, "unknown flag" + nearest(one, known)) for one in unknown if one.startswith("-")]
    chosen = [mode for mode in _MODES if getattr(flags, mode)]
    if "cfg" in chosen and "multirun" in chosen:
        text = "shows one configuration; leave out -m, or see the points by: lora-lab plan -m ..."
        problems.append(Problem("--cfg", text))
    elif len(chosen) > 1:
        problems.append(Problem("", f"only one of {', '.join(f'--{mode}' for mode in chosen)} can be given"))
    if flags.resolve and not flags.cfg and not flags.help:
        problems.append(Problem("--resolve", "needs --cfg"))
    asked = {text.partition("=")[0] for text in flags.overrides}
    if flags.shell_completion and not asked & {"install", "uninstall", "query"}:
        problems.append(Problem("--shell-completion", "needs one of install=SHELL, uninstall=SHELL, query=SHELL"))
    if flags.experimental_rerun is not None:
        problems.append(
            Problem("--experimental-rerun", "reads a pickle, which can run code; use the overrides instead")
        )
    if problems:
        raise InputError(problems)
    assert isinstance(flags, argparse.Namespace)
    return flags


def check_flags(flags: argparse.Namespace) -> Path | None:
    """The folder of `--config-dir`, where given, once its files and those of `--config-path` are safe to compose.

    Raises:
        InputError: no such folder, or files that are not plain YAML; lists all of them.
    """
    given = {"--config-path": flags.config_path, "--config-dir": flags.config_dir}
    problems = [one for where, folder in given.items() if folder for one in folder_problems(folder, where=where)]
    if problems:
        raise InputError(problems)
    return None if flags.config_dir is None else Path(flags.config_dir)


def folder_problems(folder: str, *, where: str) -> list[Problem]:
    """What is wrong with a folder of configuration files that Hydra is going to read."""
    problems: list[Problem] = []
    try:
        files = sorted(existing(Path(folder), where=where, kind="folder").rglob("*.yaml"))
    except InputError as error:
        return list(error.problems)
    for path in files:
        try:
            if path.stat().st_size:  # an empty leaf chooses nothing
                read_yaml(path)
        except InputError as error:
            problems += error.problems
    return problems
