"""`run` and `plan`: Hydra's command line, with the lab's checks in front and its error messages behind.

Everything is composed and judged before Hydra starts, so that what is wrong is told all at once and in the lab's words;
Hydra then finds a call that works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lora_lab.app import overrides as checks
from lora_lab.app.compose import Composer, config_loader
from lora_lab.app.execution import carry_out
from lora_lab.app.flags import check_flags, parse_flags
from lora_lab.app.hydra_settings import (
    is_multirun,
    launches_one_by_one,
    load_master,
    plugin_problems,
    swept_by_settings,
)
from lora_lab.app.interpolation import first_line
from lora_lab.app.locations import conf_folder
from lora_lab.app.memory_device import device_problems
from lora_lab.app.own_flags import take_own_flags
from lora_lab.app.request import gather, single
from lora_lab.app.session import Session, activated, active_session
from lora_lab.errors import InputError, Problem


def main(arguments: Sequence[str]) -> int:
    """`arguments`: the command's name, then Hydra's flags and overrides, and the lab's own flags (`own_flags`)."""
    command = arguments[0]
    own, rest = take_own_flags(command, arguments[1:])
    flags = parse_flags(command, rest)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions; none is printed as a traceback
    if flags.help or flags.hydra_help or flags.info or flags.shell_completion:
        _run_hydra(command, rest)
        return 0
    session = Session(functools.partial(carry_out, command=command, own=own), needs_weights=not own.memory)
    texts = _prepare(session, flags, device_problems(own))
    with activated(session):
        _run_hydra(command, [argument for argument in rest if argument not in flags.overrides] + texts)
    if session.error is not None:
        raise session.error
    return session.exit_code


def _prepare(session: Session, flags: argparse.Namespace, of_flags: list[Problem]) -> list[str]:
    """Composes and judges everything; returns the overrides as Hydra should get them (`model=./folder` spelt out).

    of_flags: problems of the lab's own flags, told with the others.

    Raises:
        InputError: with every problem of the command line.
    """
    loader = config_loader(primary=_primary(flags), extra=check_flags(flags))
    checked = checks.check(flags.overrides)
    hydra_own = [one for one in checked.overrides if one.key_or_group.startswith("hydra")]
    problems = [*of_flags, *checked.problems, *plugin_problems(hydra_own, loader)]
    lines = [_text(one) for one in hydra_own if one.key_or_group not in {known.where for known in problems}]
    master = load_master(loader, flags, lines)
    composer = Composer(loader, master)
    own = [one for one in checked.overrides if one not in hydra_own]
    multirun = is_multirun(master, flags)
    if multirun:
        points, found = _points(loader, [*swept_by_settings(master), *map(_text, own)], limit=master.max_runs)
        request = gather(composer, points)
    else:
        found = [problem for one in own for problem in checks.sweep_problems(one)]
        points = [[_text(one) for one in own if not one.is_sweep_override()]]
        request = single(composer.attempt(points[0]))
    request = dataclasses.replace(request, problems=(*problems, *found, *request.problems))
    if not flags.cfg or request.problems or any(point.problems for point in request.points):
        plan = session.plan(request)
        session.prepared = None if multirun and launches_one_by_one(master) else (points, plan)
    return list(flags.overrides) if multirun else [*lines, *request.points[0].overrides]


def _primary(flags: argparse.Namespace) -> Path | None:
    return None if flags.config_path is None else Path(flags.config_path).absolute()


def _text(override: Override) -> str:
    return str(override.input_line)


def _points(loader: ConfigLoader, texts: list[str], *, limit: int) -> tuple[list[list[str]], list[Problem]]:
    """All points; where there are none or too many, one of them, so that its other problems are told too."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    for one in parsed:
        value = one.value() if one.key_or_group == "max_runs" else None
        if isinstance(value, int) and value >= 1:  # any other is refused with the rest of the housekeeping
            limit = value
    try:
        return checks.expand(parsed, max_runs=limit), []
    except InputError as error:
        return [checks.first_point(parsed)], list(error.problems)


def _run_hydra(command: str, arguments: Sequence[str]) -> None:
    def task(config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        active_session().handle_single(config, list(HydraConfig.get().overrides.task))

    saved = sys.argv
    sys.argv = [f"lora-lab {command}", *arguments]
    application = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(task)
    try:
        application()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(first_line(error)) from None
    finally:
        sys.argv = saved
