"""Study files on disk: found by name, read, and every problem shown with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.paths import existing
from lora_lab.plan.strict_yaml import Document, read_yaml
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


def read_study_with_places(path: Path) -> tuple[Study, dict[tuple[str, str], str]]:
    """The study, and `file:line:column` by `value_key` for every value it sets, where the value stands first.

    Raises:
        InputError: as `read_study`.
    """
    study, document = read_study(path), read_yaml(path)
    places: dict[tuple[str, str], str] = {}
    for key, value, keys in _values(study, document):
        places.setdefault(value_key(key, value), document.where(keys))
    return study, places


def _values(study: Study, document: Document) -> Iterator[tuple[str, object, tuple[str, ...]]]:
    """Key, value, and path inside the file."""
    for key, value in study.base.items():
        yield key, value, ("base", key)
    for number, grid in enumerate(study.grids):
        outside = document.content["grids"][number]
        for axes in grid.dimensions:
            for key, axis in axes.items():
                path = ("grids", str(number), key) if key in outside else ("grids", str(number), "zip", key)
                for index, value in enumerate(axis):
                    yield key, value, (*path, str(index))
    yield from (("seed", seed, ("seeds", str(index))) for index, seed in enumerate(study.seeds))
    yield from (("metrics", metric, ("metrics", str(index))) for index, metric in enumerate(study.metrics))


def value_key(key: str, value: object) -> tuple[str, str]:
    """How a value of a study is looked up in the places of `read_study_with_places`."""
    return key, repr(value)


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
