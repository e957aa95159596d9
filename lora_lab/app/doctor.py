"""`lora-lab doctor`: what this machine has, what is missing and what that prevents; whether a study can run offline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_lab.errors import MachineError, Problem

_WIDEST = 30  # a longer name, such as a path, moves its own line only


def main(arguments: Sequence[str]) -> int:
    """Runs `doctor ...`; exit code 4 where the lab, or what was asked for, cannot run here.

    Raises:
        InputError: wrong overrides, or no such study.
        MachineError: a library is missing without which not even the configuration can be read.
    """
    options = _options(arguments[1:])
    try:
        return _examine(options)
    except ImportError as error:
        advice = "install lora-lab with everything it needs: pip install lora-lab, or pip install -e . in a checkout"
        raise MachineError(Problem("doctor", f"{error}; nothing can run; {advice}")) from None


def add_places(parser: argparse.ArgumentParser) -> None:
    """Options for a study, and those that stand in for root= and cache=."""
    parser.add_argument("--study", help="a file of sweeps/, by name")
    parser.add_argument("--root", type=Path, help="the lab's folder (default: root= of the configuration, ./lab)")
    parser.add_argument("--cache", type=Path, help="where models and data are kept (default: ROOT/cache)")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-lab doctor",
        description="What this machine has and lacks, and whether a study finds everything it needs without a network; "
        "or a trial or sweep, given by overrides as for `run -m`; else the default trial. Exit code 4: it does not.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `lora-lab run -m`")
    add_places(parser)
    parser.add_argument("--json", action="store_true", help="a list of {check, state, fact, prevents, advice}")
    return parser.parse_args(arguments)


def _examine(options: argparse.Namespace) -> int:
    from lora_lab.app.diagnosis import FetchCommands, label, look
    from lora_lab.app.parts import Shelf
    from lora_lab.report.checks import print_check, write_checks
    from lora_lab.report.grid import console_for, print_line

    overrides = [*options.overrides, *([] if options.study is None else [f"study={options.study}"])]
    shelf = Shelf()
    needs = shelf.needs(overrides, root=options.root, cache=options.cache)
    commands = FetchCommands(
        overrides, needs, names_root=options.root is not None, names_cache=options.cache is not None
    )
    console = None if options.json else console_for(None)
    width = min(_WIDEST, max([len("embedded model"), *(len(label(part)) for part in needs.parts)]))
    seen = []
    for one in look(shelf, needs, commands):
        seen.append(one)
        if console is not None:
            print_check(console, one.check, width=width)
    is_ready = not any(one.is_essential and one.check.state == "missing" for one in seen)
    if console is None:
        write_checks([one.check for one in seen])
    else:
        told = "finds everything it needs here, without a network" if is_ready else "cannot run here yet"
        print_line(console, f"{_asked(options)} {told}", style="bold")
    return 0 if is_ready else MachineError.exit_code


def _asked(options: argparse.Namespace) -> str:
    if options.study is not None:
        return f"study {options.study}"
    return "what was asked for" if options.overrides else "the default trial"
