"""`lora-lab eval`'s command line: lm-eval's own flags under our name, and three of ours. No torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lm_eval._cli import HarnessCLI

from lora_lab.errors import InputError, Problem, nearest

PROGRAM = "lora-lab eval"
Kind = Literal["run", "ls", "validate"]

_DESCRIPTION = (
    "Scores a model by lm-evaluation-harness's own command, run with the lab's model lora_lab, which computes every "
    "shared token once. The flags are lm-eval's, those of the last group ours; `ls` and `validate` are lm-eval's too."
)
_EXAMPLES = f"""examples:
  # a model of the lab on official rows that lie in a folder, without a network
  $ {PROGRAM} --model_args pretrained=smollm2_135m --tasks piqa,copa --mirror DIR

  # an adapter on a local folder, scored by lm-eval's own engine
  $ {PROGRAM} --model_args pretrained=./model,peft=./adapter,engine=stock --tasks arc_easy --batch_size 8

  # lm-eval's tasks
  $ {PROGRAM} ls tasks
"""
# What lm-eval says of these flags is not so here.
_OTHER_HELP = {
    "--model": "lora_lab, and no other",
    "--model_args": "pretrained=MODEL: a folder, org/name of the hub, or a choice of model= of the lab; peft=ADAPTER; "
    "engine=stock for lm-eval's own batches; chunk_tokens=N; all that lm-eval's hf takes, as dtype=bfloat16",
    "--use_cache": "refused: the keys of lm-eval's cache do not say which adapter it was",
}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """kind: which of lm-eval's commands. options: lm-eval's own. mirror: a folder of official rows, or None. cache:
    where prepared models, task files and rows are kept."""

    kind: Kind
    options: argparse.Namespace
    mirror: str | None
    cache: Path


def parse_command(arguments: Sequence[str]) -> CommandLine:
    """Reads `eval`'s arguments as lm-eval would; `run` may be left out.

    Raises:
        InputError: an unknown flag (with the nearest), or a value that is no JSON.
        SystemExit: 0 after --help, 2 where argparse has said what is wrong.
    """
    parsers = HarnessCLI()._subparsers.choices
    kind, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in parsers else ("run", arguments)
    parser = parsers[kind]
    _rename(parser, kind)
    if kind == "run":
        _describe(parser)
        _add_own(parser)
        rest = rest or ["--help"]  # as lm-eval does
    try:
        options, unknown = parser.parse_known_args(list(rest))
    except ValueError as error:  # of lm-eval's own reading of JSON
        raise InputError(Problem("", str(error))) from None
    if unknown:
        flags = [one for one in unknown if one.startswith("-")]  # the others may be values of these
        raise InputError([_unknown(one, parser) for one in flags or unknown])
    own = {name: vars(options).pop(name, None) for name in ("mirror", "root", "cache")}
    cache = own["cache"] or (own["root"] or Path("lab")) / "cache"
    return CommandLine(cast(Kind, kind), options, own["mirror"], cache)


def _rename(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.prog = PROGRAM if kind == "run" else f"{PROGRAM} {kind}"
    for name in ("usage", "description", "epilog"):
        setattr(parser, name, _renamed(getattr(parser, name)))
    for action in parser._actions:
        action.help = _renamed(action.help)


def _renamed(text: str | None) -> str | None:
    if text is None:
        return None
    return re.sub(r"\blm-eval(?: run)?(?= )", PROGRAM, text.replace("lm-eval list", "lm-eval ls"))


def _describe(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{PROGRAM} --model_args pretrained=MODEL[,peft=ADAPTER] --tasks TASK [TASK ...] [options]"
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    for flag, text in _OTHER_HELP.items():
        parser._option_string_actions[flag].help = text


def _add_own(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA Lab's own")
    group.add_argument(
        "--mirror",
        metavar="DIR",
        help="official tasks read their rows from this folder, which has a MANIFEST.csv (as evaluation.mirror)",
    )
    group.add_argument("--root", type=Path, help="the lab's folder (default: ./lab)")
    group.add_argument("--cache", type=Path, help="where prepared models, tasks and rows are kept (ROOT/cache)")


def _unknown(text: str, parser: argparse.ArgumentParser) -> Problem:
    if not text.startswith("-"):
        return Problem(text, "belongs to no flag")
    known: dict[str, Any] = parser._option_string_actions
    return Problem(text, "unknown flag" + nearest(text, sorted(one for one in known if one.startswith("--"))))
