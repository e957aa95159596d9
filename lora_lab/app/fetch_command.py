"""`lora-lab fetch`: brings models, data sets and tasks to this machine, so that runs find them without a network.

Whether a part is here is asked as the doctor asks it, with the hub switched off: before, so that nothing is fetched
twice, and afterwards, so that what is said to be here is what a later run will find.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from lora_lab.app.diagnosis import DEFAULT_MODEL, part_question
from lora_lab.app.doctor import add_places
from lora_lab.app.machine_checks import hub_check
from lora_lab.app.part_checks import HUB_SWITCHED_OFF, can_be_fetched, get
from lora_lab.app.part_names import parts_named
from lora_lab.app.parts import Part, Shelf
from lora_lab.app.questions import Answer, ask
from lora_lab.errors import InputError, LabError, MachineError
from lora_lab.report.grid import console_for, print_line
from lora_lab.report.text import bytes_text
from lora_lab.schema.model import EmbeddedModel

State = Literal["fetched", "already there", "nothing to fetch", "missing"]
_STYLES: dict[State, str] = {"missing": "red", "fetched": "green"}


@dataclass(frozen=True, slots=True)
class Item:
    """What became of one part. path, bytes: where it lies and its size, None where it needs no file of its own or is
    missing. note: where it comes from, or why it is missing, which asks for `exit_code`."""

    part: Part
    state: State
    path: str | None
    bytes: int | None
    note: str
    exit_code: int = 0


def main(arguments: Sequence[str]) -> int:
    """Runs `fetch ...`; exit code 4 where hub or disk refused something, 2 where a name or its data is wrong."""
    options = _options(arguments[1:])
    shelf = Shelf()
    parts, cache = _asked_for(options, shelf)
    if not sys.stderr.isatty():
        os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    console = None if options.json else console_for(None)
    fetcher = _Fetcher(cache, console)
    brought = [fetcher.bring(part, answer) for part, answer in zip(parts, _look_at(parts, cache), strict=True)]
    items = _confirmed(brought, cache)
    if console is None:
        json.dump(_as_json(items), sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        for item in items:
            _print_item(console, item)
        _print_total(console, items)
    return max(item.exit_code for item in items)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-lab fetch",
        description="Bring what runs need to this machine. A NAME is a model (a choice of model=, or org/name of the "
        "hub), a data set (a choice of data=) or a task of lm-eval; model:NAME, data:NAME, task:NAME say which. "
        "KEY=VALUE, as for `run -m`, and --study stand for everything that such runs need. "
        "Without any of them: the embedded model, which takes about 30 s, once.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME|KEY=VALUE")
    add_places(parser)
    parser.add_argument("--json", action="store_true", help="items with state, path and bytes, and the total")
    return parser.parse_args(arguments)


def _asked_for(options: argparse.Namespace, shelf: Shelf) -> tuple[list[Part], Path]:
    """All parts, each once, and the cache; raises InputError with what is wrong with names and overrides together."""
    names = [text for text in options.names if "=" not in text]
    overrides = [text for text in options.names if "=" in text]
    if options.study is not None:
        overrides.append(f"study={options.study}")
    needs = shelf.needs(overrides, root=options.root, cache=options.cache)
    places_only = all(line.partition("=")[0] in ("root", "cache") for line in overrides)
    if not names and places_only:
        names = [f"model:{DEFAULT_MODEL}"]
    parts = [] if places_only else list(needs.parts)
    parts += [part for part in parts_named(names, shelf, needs.cache) if part not in parts]
    return parts, needs.cache


def _look_at(parts: Sequence[Part], cache: Path) -> list[Answer]:
    return list(ask([part_question(part, cache) for part in parts], environment=HUB_SWITCHED_OFF))


class _Fetcher:
    """Fetches parts one after another. Once the hub did not answer it is not asked again for every part that is left:
    each would wait through the same retries."""

    def __init__(self, cache: Path, console: Console | None) -> None:
        self._cache = cache
        self._console = console
        self._is_out_of_reach = False

    def bring(self, part: Part, before: Answer) -> Item | Part:
        """What became of it, or the part itself once it has been fetched. `before`: whether it is here already."""
        if before.trouble is None and before.value["is_prepared"]:
            return _item(part, "already there" if can_be_fetched(part) else "nothing to fetch", before)
        if not can_be_fetched(part):
            return _missing(part, str(before.trouble), InputError.exit_code)
        needs_hub = not isinstance(part.section, EmbeddedModel)
        if needs_hub and self._is_out_of_reach:
            return _missing(part, "the hub cannot be reached", MachineError.exit_code)
        if self._console is not None:
            print_line(self._console, f"fetching {part.kind} {part.name} ...", style="dim")
        try:
            with contextlib.redirect_stdout(sys.stderr), _no_word_of_retries():  # our output is for our lines
                get(part, self._cache)
        except LabError as error:
            if needs_hub and isinstance(error, MachineError):
                self._is_out_of_reach = hub_check(os.environ).state != "ok"
            code = max(error.exit_code, InputError.exit_code)
            return _missing(part, "; ".join(map(str, error.problems)), code)
        return part


@contextlib.contextmanager
def _no_word_of_retries() -> Iterator[None]:
    """The hub client tells of every attempt; what came of them all is told once, by us."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _confirmed(brought: Sequence[Item | Part], cache: Path) -> list[Item]:
    """The items, once what was fetched has been found without the hub."""
    answers = iter(_look_at([one for one in brought if isinstance(one, Part)], cache))
    return [one if isinstance(one, Item) else _fetched(one, next(answers)) for one in brought]


def _fetched(part: Part, after: Answer) -> Item:
    if after.trouble is not None:
        reason = f"fetched, but a run without a network would not find it: {after.trouble}"
        return _missing(part, reason, MachineError.exit_code)
    return _item(part, "fetched", after)


def _item(part: Part, state: State, answer: Answer) -> Item:
    holding = answer.value
    return Item(part, state, holding["path"], holding["bytes"], holding["note"])


def _missing(part: Part, reason: str, exit_code: int) -> Item:
    return Item(part, "missing", None, None, reason, exit_code)


def _print_item(console: Console, item: Item) -> None:
    where = "" if item.path is None else f", {bytes_text(item.bytes)} in {item.path}"
    line = f"{item.part.kind} {item.part.name}: {item.state}: {item.note}{where}"
    print_line(console, line, style=_STYLES.get(item.state, ""))


def _print_total(console: Console, items: Sequence[Item]) -> None:
    told = []
    for state in ("fetched", "already there", "nothing to fetch", "missing"):
        chosen = [item for item in items if item.state == state]
        size = sum(item.bytes for item in chosen if item.bytes is not None)
        if chosen:
            told.append(f"{len(chosen)} {state}" + (f" ({bytes_text(size)})" if size else ""))
    print_line(console, f"total: {', '.join(told)}", style="bold")
    if missing := _missing_names(items):
        print_line(console, f"still missing: {', '.join(missing)}", style="red")


def _missing_names(items: Sequence[Item]) -> list[str]:
    return [f"{item.part.kind}:{item.part.name}" for item in items if item.state == "missing"]


def _as_json(items: Sequence[Item]) -> dict[str, object]:
    sizes = [(item.state, item.bytes) for item in items if item.bytes is not None]
    shown = ("state", "path", "bytes", "note")
    return {
        "items": [
            {"kind": item.part.kind, "name": item.part.name, **{key: getattr(item, key) for key in shown}}
            for item in items
        ],
        "total_bytes": sum(size for _, size in sizes),
        "fetched_bytes": sum(size for state, size in sizes if state == "fetched"),
        "missing": _missing_names(items),
    }
