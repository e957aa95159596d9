"""Tasks that `lora-lab eval` was asked for: all of them there, and those whose rows are local files prepared."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from lora_lab.errors import InputError, Problem
from lora_lab.evaluate.catalogue import official_tasks
from lora_lab.evaluate.check import LOCAL_TASKS, locate_tasks
from lora_lab.evaluate.mirror import read_mirror
from lora_lab.evaluate.tasks import prepare_tasks
from lora_lab.schema.evaluation import Evaluation

# Flags for the keys by which the lab's own checks name what is wrong.
_FLAGS = {"evaluation.tasks": "--tasks", "evaluation.mirror": "--mirror"}


@dataclass(frozen=True, slots=True)
class CommandTasks:
    """names: as lm-eval is asked for them. folders: of task files besides lm-eval's own. needs_defaults: whether
    lm-eval must read its own task files (seconds). prepared: those whose rows are local files."""

    names: tuple[str, ...]
    folders: tuple[str, ...]
    needs_defaults: bool
    prepared: tuple[str, ...]


def command_tasks(
    asked: Sequence[str], *, defaults: Evaluation, mirror: str | None, include_path: str | None, cache: Path
) -> CommandTasks:
    """Finds every name among lm-eval's and the lab's own, and prepares those whose rows are local.

    asked: names, patterns such as `blimp_*`, task files. defaults: gives the lab's own tasks their settings. With
    `include_path` names that are not known are left to lm-eval, which reads that folder.

    Raises:
        InputError: no task, unknown names (with the nearest), a mirror that has not the rows.
        IdentityError: a mirrored file is not the declared one.
    """
    names = [name for name in dict.fromkeys(one.strip() for one in asked) if name]
    if not names:
        raise InputError(Problem("--tasks", "at least one is needed; lora-lab eval ls tasks lists lm-eval's"))
    needed = any(name not in LOCAL_TASKS for name in names)
    own = defaults.model_copy(update={"mirror": mirror, "include_path": None, "num_fewshot": None})
    with _named_by_flags():
        official = official_tasks(cache) if needed else {}
        mirrored = sorted(set(read_mirror(mirror)) & set(official)) if mirror is not None and needed else []
        names = [found for name in names for found in _matches(name, mirrored)]
        _refuse_unknown(names, official, own, leave=include_path is not None, cache=cache)
        ours = tuple(name for name in names if name in LOCAL_TASKS or (mirror is not None and name in official))
        folders = prepare_tasks(own.model_copy(update={"tasks": ours}), cache=cache).folders if ours else ()
    given = () if include_path is None else (include_path,)
    return CommandTasks(
        names=tuple(names),
        folders=(*(str(folder.absolute()) for folder in folders), *given),
        needs_defaults=len(ours) < len(names),
        prepared=ours,
    )


@contextlib.contextmanager
def _named_by_flags() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise type(error)([Problem(_FLAGS.get(one.where, one.where), one.message) for one in error.problems]) from None


def _matches(name: str, mirrored: Sequence[str]) -> list[str]:
    """A pattern's names among those of a mirror: lm-eval would also find those without rows. Others as they are."""
    return (fnmatch.filter(mirrored, name) if _is_pattern(name) else []) or [name]


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[") and not _is_file(name)


def _is_file(name: str) -> bool:
    """As lm-eval tells them apart; it may be a pattern too."""
    return name.endswith(".yaml")


def _refuse_unknown(
    names: Sequence[str], official: Iterable[str], own: Evaluation, *, leave: bool, cache: Path
) -> None:
    """leave: names that may yet be found in a folder of the user's own are lm-eval's to refuse."""
    files = [name for name in names if _is_file(name)]
    # As lm-eval looks for them; Path.glob takes no absolute pattern.
    problems = [Problem("--tasks", f'no such file: "{name}"') for name in files if not glob(name)]  # noqa: PTH207
    others = [] if leave else [name for name in names if not _is_file(name) and not Path(name).is_dir()]
    patterns = [name for name in others if _is_pattern(name)]
    problems += [
        Problem("--tasks", f'no task matches "{name}"') for name in patterns if not fnmatch.filter(official, name)
    ]
    plain = tuple(name for name in others if not _is_pattern(name))
    try:
        locate_tasks(own.model_copy(update={"tasks": plain, "mirror": None}), cache=cache)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
