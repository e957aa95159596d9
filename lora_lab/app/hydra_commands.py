"""`run` and `plan`: Hydra's command line, with the lab's checks in front and its error messages behind."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lora_lab.app import overrides as checks
from lora_lab.app.compose import Composer, config_loader
from lora_lab.app.execution import carry_out
from lora_lab.app.locations import conf_folder
from lora_lab.app.session import Session, activated
from lora_lab.errors import InputError


def main(arguments: Sequence[str]) -> int:
    """`arguments`: the command's name, then Hydra's flags and overrides, and `--json`."""
    command, *rest = arguments
    as_json = "--json" in rest
    rest = [argument for argument in rest if argument != "--json"]
    flags = get_args_parser().parse_args(rest)
    texts = list(flags.overrides)
    checks.check(texts, multirun=flags.multirun)
    if flags.multirun and flags.cfg:
        raise InputError("--cfg shows one configuration; leave out -m, or see the points by: lora-lab plan -m ...")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions; none is printed as a traceback
    rewritten = _check_composition(texts, config_name=flags.config_name or "config", multirun=flags.multirun)
    session = Session(functools.partial(carry_out, command=command, as_json=as_json))
    with activated(session):
        _run_hydra(command, _replaced(rest, texts, rewritten))
    return session.exit_code


def _check_composition(texts: Sequence[str], *, config_name: str, multirun: bool) -> list[str]:
    """Composes a single trial once before Hydra does, which reports all that is wrong with it and not only the first.

    Returns the overrides as Hydra should get them (`model=./folder` spelt out).
    """
    hydra_own = [text for text in texts if text.startswith("hydra")]
    own = [text for text in texts if not text.startswith("hydra")]
    loader = config_loader()
    try:
        master = loader.load_configuration(config_name, hydra_own, RunMode.MULTIRUN if multirun else RunMode.RUN)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(error).splitlines()[0]) from None
    if multirun:
        return list(texts)
    composition = Composer(loader, master).compose(own)
    return [*hydra_own, *composition.overrides]


def _replaced(arguments: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if argument not in before] + list(after)


def _run_hydra(command: str, arguments: Sequence[str]) -> None:
    def task(config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        from lora_lab.app.session import active_session

        active_session().handle_single(config, list(HydraConfig.get().overrides.task))

    saved = sys.argv
    sys.argv = [f"lora-lab {command}", *arguments]
    application = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(task)
    try:
        application()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(error).splitlines()[0]) from None
    finally:
        sys.argv = saved
