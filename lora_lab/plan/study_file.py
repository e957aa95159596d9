"""Study files on disk: found by name, read, and every problem shown with its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.paths import existing
from lora_lab.plan.strict_yaml import read_yaml
from lora_lab.schema.labels import check_label
from lora_lab.schema.study import Study, study_from


def read_study(path: Path) -> Study:
    """The study in a YAML file; it is named by the file's stem.

    Raises:
        InputError: with every problem found, each as `file:line:column: key: message`.
    """
    document = read_yaml(existing(path, where="study", kind="file"))
    try:
        return study_from(document.content, name=path.stem)
    except InputError as error:
        raise InputError(
            [
                Problem(document.where(problem.where.split(".") if problem.where else []), str(problem))
                for problem in error.problems
            ]
        ) from None


def find_study(name: str, folders: Sequence[Path]) -> Path:
    """The file `NAME.yaml` in the first of the folders that has it.

    Raises:
        InputError: no folder has it (with the nearest names), or the name is not a plain label.
    """
    try:
        check_label(name)
    except ValueError as error:
        raise InputError(Problem("study", str(error))) from None
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})
    raise InputError(Problem("study", f'no study "{name}"' + nearest(name, names)))
