"""Names on the command line of `fetch`: which model, data set or task each means, or why it means none or several."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from lora_lab.app.parts import KINDS, Kind, Part, Shelf
from lora_lab.errors import InputError, Problem
from lora_lab.evaluate.catalogue import official_tasks
from lora_lab.evaluate.check import LOCAL_TASKS, check_evaluation

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SHOWN_NAMES = 3


def parts_named(names: Sequence[str], shelf: Shelf, cache: Path) -> list[Part]:
    """One part for each name: a choice of conf/model or conf/data, `org/name` for a model of the hub, a task; with the
    kind in front (`task:gsm8k`) where a name is of more than one kind.

    Raises:
        InputError: names that are unknown, of more than one kind, or of tasks that are refused; all of them.
    """
    finder = _Finder(shelf, cache)
    found: list[Part] = []
    problems: list[Problem] = []
    for name in dict.fromkeys(names):
        try:
            part = finder.find(name)
            if part not in found:
                found.append(part)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found


class _Finder:
    def __init__(self, shelf: Shelf, cache: Path) -> None:
        self._shelf = shelf
        self._cache = cache
        self._choices: dict[Kind, set[str]] = {}

    def find(self, text: str) -> Part:
        """The part that `text` means; raises InputError where it means none, or several."""
        kinds, name = _split(text)
        if "model" in kinds and _REPOSITORY.fullmatch(name):
            return self._shelf.model(name)
        if kinds == ("task",) and name in LOCAL_TASKS:
            return self._part("task", name)
        fitting = [kind for kind in kinds if name in self._names(kind)]
        if not fitting:
            raise InputError(Problem("fetch", f'no {_listed(kinds)} "{name}"{self._nearest(name, kinds)}'))
        if len(fitting) > 1:
            forms = " or ".join(f"{kind}:{name}" for kind in fitting)
            raise InputError(Problem("fetch", f'"{name}" is a {" and a ".join(fitting)}; write {forms}'))
        return self._part(fitting[0], name)

    def _part(self, kind: Kind, name: str) -> Part:
        if kind == "model":
            return self._shelf.model(name)
        if kind == "data":
            return self._shelf.data(name)
        part = self._shelf.task(name)
        check_evaluation(part.section, cache=self._cache)  # type: ignore[arg-type]  # a task's section is one
        return part

    def _names(self, kind: Kind) -> set[str]:
        """All names of a kind; reading those of lm-eval takes two seconds, once."""
        if kind not in self._choices:
            tasks = kind == "task"
            own = (*LOCAL_TASKS, *official_tasks(self._cache)) if tasks else self._shelf.names(kind)
            self._choices[kind] = set(own)
        return self._choices[kind]

    def _nearest(self, name: str, kinds: Sequence[Kind]) -> str:
        """The closest names of all kinds; lm-eval has some 15,000, so only the configuration's are listed."""
        forms = {one: f"{kind}:{one}" for kind in kinds for one in sorted(self._names(kind))}
        close = difflib.get_close_matches(name, list(forms), n=_SHOWN_NAMES, cutoff=0.6)
        hint = f"; did you mean {', '.join(forms[one] for one in close)}?" if close else ""
        listed = [f"{kind}: {', '.join(sorted(self._names(kind)))}" for kind in kinds if kind != "task"]
        if "model" in kinds:
            listed[0] += ", or org/name"
        if "task" in kinds:
            listed.append(
                f"task: {', '.join(LOCAL_TASKS)}, and lm-eval's {len(self._names('task')) - len(LOCAL_TASKS)}"
            )
        return f"{hint} ({'; '.join(listed)})"


def _split(text: str) -> tuple[tuple[Kind, ...], str]:
    """The kinds that a text may mean, and the name in it."""
    for kind in KINDS:
        if text.startswith(f"{kind}:"):
            return (kind,), text.removeprefix(f"{kind}:")
    return KINDS, text


def _listed(kinds: Sequence[Kind]) -> str:
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"
