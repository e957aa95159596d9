"""What can be known to be wrong about an evaluation before a model loads. Imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_lab.data.prose import prose_sentences, prose_text
from lora_lab.errors import InputError, Problem, nearest
from lora_lab.evaluate.catalogue import Catalogue, leaves, official_tasks
from lora_lab.evaluate.mirror import Mirror, mirror_problems, read_mirror
from lora_lab.evaluate.user_tasks import user_tasks
from lora_lab.schema.evaluation import Evaluation

T = TypeVar("T")

LOCAL_TASKS = ("prose_completion", "prose_perplexity", "skills_trained", "skills_unseen")


@dataclass(frozen=True, slots=True)
class Located:
    """Task names by where they come from; what of lm-eval and of the mirror was read for it."""

    local: tuple[str, ...]
    user: tuple[str, ...]
    official: tuple[str, ...]
    catalogue: Catalogue
    mirror: Mirror | None


def check_evaluation(evaluation: Evaluation, *, cache: Path) -> None:
    """Raises InputError with everything wrong with `evaluation`: unknown or repeated tasks, tasks that run code,
    few-shot counts that a task ignores, task files with code, a mirror without the data, more prose than there is.

    No tasks and no held-out rows is allowed: such a run is about time and memory, and its metrics stay empty.
    """
    located = locate_tasks(evaluation, cache=cache)
    problems = [
        *_prose_problems(evaluation, located.local),
        *_few_shot_problems(evaluation, located),
        *_unsafe_problems(located),
    ]
    if located.mirror is not None:
        problems += mirror_problems(located.mirror, located.catalogue, located.official)
    if problems:
        raise InputError(problems)


def locate_tasks(evaluation: Evaluation, *, cache: Path) -> Located:
    """Where each task comes from. lm-eval's files are read only when a name is not one of ours.

    Raises:
        InputError: unknown or repeated names, a folder that is not usable, a name of the user's that hides another.
    """
    problems: list[Problem] = []
    own: Mapping[str, Path] = {}
    mirror: Mirror | None = None
    if evaluation.include_path is not None:
        own = _or_problems(user_tasks, evaluation.include_path, problems) or {}
    if evaluation.mirror is not None:
        mirror = _or_problems(read_mirror, evaluation.mirror, problems)
    rest = [name for name in evaluation.tasks if name not in LOCAL_TASKS and name not in own]
    catalogue: Catalogue = official_tasks(cache) if rest or own or mirror is not None else {}
    problems += _name_problems(evaluation.tasks, own, catalogue)
    if problems:
        raise InputError(problems)
    return Located(
        local=tuple(name for name in evaluation.tasks if name in LOCAL_TASKS),
        user=tuple(name for name in evaluation.tasks if name in own),
        official=tuple(rest),
        catalogue=catalogue,
        mirror=mirror,
    )


def _or_problems(read: Callable[[str], T], folder: str, problems: list[Problem]) -> T | None:
    """What `read` returns; its problems are added to the others, so that one try shows all."""
    try:
        return read(folder)
    except InputError as error:
        problems += error.problems
        return None


def _name_problems(names: Sequence[str], own: Mapping[str, Path], catalogue: Catalogue) -> list[Problem]:
    problems = []
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem("evaluation.tasks", f'"{name}" is given twice'))
    for name, path in own.items():
        if name in LOCAL_TASKS or name in catalogue:
            problems.append(Problem(str(path), f'"{name}" is already the name of a task; choose another'))
    for name in dict.fromkeys(names):
        if name not in LOCAL_TASKS and name not in own and name not in catalogue:
            problems.append(Problem("evaluation.tasks", f'no such task "{name}"{_nearest_task(name, own, catalogue)}'))
    return problems


def _nearest_task(name: str, own: Mapping[str, Path], catalogue: Catalogue) -> str:
    """lm-eval has some 15,000 names: the closest one is shown, and only our own are listed."""
    everything = [*LOCAL_TASKS, *own, *catalogue]
    closest = nearest(name, everything).split(" (choices:")[0]
    ours = ", ".join([*LOCAL_TASKS, *own])
    return f"{closest} (choices: {ours}, and the {len(catalogue)} names of lm-eval)"


def _prose_problems(evaluation: Evaluation, local: Sequence[str]) -> list[Problem]:
    problems = []
    words, sentences = len(prose_text().split()), len(prose_sentences())
    if "prose_perplexity" in local and evaluation.prose.perplexity_words > words:
        message = f"the text has {words} words, got {evaluation.prose.perplexity_words}"
        problems.append(Problem("evaluation.prose.perplexity_words", message))
    if "prose_completion" in local and evaluation.prose.completion_documents > sentences:
        message = f"the text has {sentences} usable sentences, got {evaluation.prose.completion_documents}"
        problems.append(Problem("evaluation.prose.completion_documents", message))
    return problems


def _few_shot_problems(evaluation: Evaluation, located: Located) -> list[Problem]:
    """lm-eval leaves a task alone that is defined with 0 examples in its prompt, and goes on without a word."""
    if not evaluation.num_fewshot:
        return []
    fixed = list(located.local)
    for name in located.official:
        fixed += [task for task in leaves(located.catalogue, name)[0] if located.catalogue[task].num_fewshot == 0]
    if not fixed:
        return []
    shown = ", ".join(fixed[:5]) + (f" and {len(fixed) - 5} more" if len(fixed) > 5 else "")
    message = f"got {evaluation.num_fewshot}, but these tasks are defined without examples: {shown}; use null"
    return [Problem("evaluation.num_fewshot", message)]


def _unsafe_problems(located: Located) -> list[Problem]:
    problems = []
    for name in located.official:
        unsafe = [task for task in leaves(located.catalogue, name)[0] if located.catalogue[task].unsafe_code]
        if unsafe:
            what = name if unsafe == [name] else f"{name} (by {', '.join(unsafe[:3])})"
            message = f"{what} runs code that the model wrote, on this machine; such tasks are refused"
            problems.append(Problem("evaluation.tasks", message))
    return problems
