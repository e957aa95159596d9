"""The doctor's checks in order, and what each answer means; `app.doctor` prints them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.app.libraries import LIBRARIES, library_check, library_question
from lora_lab.app.machine_checks import disk_checks, guarded, hub_check, python_check, root_check, wandb_check
from lora_lab.app.part_checks import HUB_SWITCHED_OFF, can_be_fetched
from lora_lab.app.parts import Needs, Part, Shelf
from lora_lab.app.questions import Answer, Question, ask
from lora_lab.report.checks import Check
from lora_lab.report.text import bytes_text
from lora_lab.schema.data import SkillsData

DEFAULT_MODEL = "smollm2_135m"
_PART_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A check, and whether its `missing` keeps what was asked for from running."""

    check: Check
    is_essential: bool


class FetchCommands:
    """The `lora-lab fetch` commands that would bring parts to where this call of the doctor looked for them."""

    def __init__(self, overrides: Sequence[str], needs: Needs, *, names_root: bool, names_cache: bool) -> None:
        self._places: list[str] = []
        keys = {line.partition("=")[0] for line in overrides}
        if names_root or "root" in keys:
            self._places += ["--root", needs.lab.root]
        if names_cache or "cache" in keys:
            self._places += ["--cache", str(needs.cache)]
        self._everything = [line for line in overrides if line.partition("=")[0] not in ("root", "cache")]

    def command_of(self, *names: str) -> str:
        """`fetch` of these names."""
        return shlex.join(["lora-lab", "fetch", *self._places, *filter(None, names)])

    def command(self, shelf: Shelf, part: Part) -> str:
        """`fetch` of one part by its name, or of everything where a name would mean another revision or folder."""
        choice = shelf.choice_of(part)
        return self.command_of(*([f"{part.kind}:{choice}"] if choice is not None else self._everything))


def part_question(part: Part, cache: Path) -> Question:
    """Asks for the part's `Holding` as a mapping."""
    arguments = {"kind": part.kind, "section": part.section.model_dump_json(), "cache": str(cache)}
    return Question("part_checks:look", arguments, _PART_SECONDS)


def look(shelf: Shelf, needs: Needs, fetching: FetchCommands) -> Iterator[Seen]:
    """All checks, each as soon as it is known. One process is asked about everything that imports torch."""
    embedded = shelf.model(DEFAULT_MODEL)
    questions = [library_question(library) for library in LIBRARIES]
    questions += [part_question(part, needs.cache) for part in (embedded, *needs.parts)]
    answers = ask(questions, environment=HUB_SWITCHED_OFF)
    yield Seen(python_check(), True)
    for library in LIBRARIES:
        is_essential = library.is_essential or (needs.uses_bitsandbytes and library.check == "bitsandbytes")
        yield Seen(library_check(library, next(answers)), is_essential)
    yield Seen(_embedded_check(next(answers), fetching), False)
    yield from _machine(needs)
    for part in needs.parts:
        yield Seen(_part_check(part, next(answers), fetching.command(shelf, part)), True)


def _machine(needs: Needs) -> Iterator[Seen]:
    root, tracking = Path(needs.lab.root), needs.lab.tracking
    yield Seen(hub_check(os.environ), False)
    copies = guarded(
        "wandb",
        lambda: [wandb_check(tracking, os.environ)],
        prevents="runs are not copied to W&B",
        advice="tracking=off does without",
    )
    disks = guarded(
        "disk", lambda: disk_checks(root, needs.cache), prevents="how much fits is not known", advice="root=FOLDER"
    )
    yield from (Seen(check, False) for check in (*copies, *disks))
    writable = guarded(
        "root",
        lambda: [root_check(root, needs.cache)],
        prevents="no run can be recorded",
        advice="choose a folder that you may write to: root=FOLDER, cache=FOLDER",
    )
    yield from (Seen(check, True) for check in writable)


def _embedded_check(answer: Answer, fetching: FetchCommands) -> Check:
    name, command = "embedded model", fetching.command_of("")
    if answer.trouble is not None:
        prevents = f"model={DEFAULT_MODEL}, the default, cannot be loaded"
        return Check(name, "missing", answer.trouble, prevents, f"then {command}")
    fact = f"{DEFAULT_MODEL} {_where(answer.value)}"
    if answer.value["is_prepared"]:
        return Check(name, "ok", fact)
    return Check(name, "warning", fact, "the first run converts it, which takes about 30 s", f"{command} does it now")


def _part_check(part: Part, answer: Answer, command: str) -> Check:
    if answer.trouble is None:
        return Check(label(part), "ok", f"have it: {_where(answer.value)}")
    advice = command if can_be_fetched(part) else _own_advice(part)
    return Check(label(part), "missing", f"have it not: {answer.trouble}", f"its trials need this {part.kind}", advice)


def _own_advice(part: Part) -> str:
    """For what no `fetch` can bring here."""
    if isinstance(part.section, SkillsData):
        return f"pip install reasoning-gym=={part.section.package_version}"
    return "mend what is said there, or name another"


def label(part: Part) -> str:
    """How a part is called in a list of checks."""
    return f"{part.kind} {part.name}"


def _where(holding: Mapping[str, Any]) -> str:
    if holding["path"] is None:
        return str(holding["note"])
    return f"{holding['note']}, {bytes_text(holding['bytes'])} in {holding['path']}"
