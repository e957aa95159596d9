"""Task files of the user's own (`evaluation.include_path`): values only, never code. Torch-free.

lm-eval runs Python on loading a task file (`!function`, `class`) or on scoring (`unsafe_code`, scripts from a hub).
Here such a file is refused before lm-eval sees it, and so is everything it includes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_lab.errors import InputError, Problem

_WHERE = "evaluation.include_path"
_MAX_FILE_BYTES = 1_000_000
_MAX_FILES = 2_000
_CODE_KEYS = ("class", "unsafe_code", "custom_dataset")
# lm-eval renders templates in a plain Jinja environment, where attributes like __class__ lead to any function.
_DUNDER = re.compile(r"__[a-z]+__")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe, and an unknown tag says what it is."""


def _refuse_tag(loader: Any, suffix: str, node: Any) -> None:
    raise yaml.constructor.ConstructorError(
        None, None, f"the tag !{suffix} is refused: a task file of your own holds values, not code", node.start_mark
    )


_Loader.add_multi_constructor("!", _refuse_tag)


def user_tasks(folder: str) -> dict[str, Path]:
    """Names (tasks, groups) that the YAML files under `folder` define.

    Raises:
        InputError: no such folder, or files that hold code, are unreadable, include something outside the folder, or
            define a name twice; lists every file.
    """
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise InputError(Problem(_WHERE, f'no such folder: "{folder}"'))
    paths = sorted(root.glob("**/*.yaml"))
    if not paths:
        raise InputError(Problem(_WHERE, f'no *.yaml files in "{folder}"'))
    if len(paths) > _MAX_FILES:
        raise InputError(Problem(_WHERE, f'{len(paths)} YAML files in "{folder}"; at most {_MAX_FILES}'))
    names: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        config, found = _read(path, root, seen=())
        problems += found
        name = config.get("group", config.get("task"))
        if found or not isinstance(name, str):
            continue
        if name in names:
            problems.append(Problem(str(path), f'"{name}" is also defined in {names[name]}'))
        names[name] = path
    if problems:
        raise InputError(problems)
    return names


def user_tasks_identity(folder: str) -> str:
    """SHA-256 over the names and bytes of all files under `folder`, data files included."""
    root = Path(folder).expanduser().absolute()
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _read(path: Path, root: Path, *, seen: tuple[Path, ...]) -> tuple[dict[str, Any], list[Problem]]:
    """A file with its includes below it, and what is wrong with them."""
    if path in seen:
        return {}, [Problem(str(path), "includes itself")]
    if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
        return {}, [Problem(str(seen[-1] if seen else path), f'"{path}" is not a file inside {_WHERE}')]
    if path.stat().st_size > _MAX_FILE_BYTES:
        return {}, [Problem(str(path), f"larger than {_MAX_FILE_BYTES} bytes: not a task file")]
    try:
        own = yaml.load(path.read_bytes(), Loader=_Loader)  # a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        return {}, [Problem(f"{path}{line}", getattr(error, "problem", None) or str(error))]
    if not isinstance(own, dict):
        return {}, [Problem(str(path), "expected a mapping of keys to values")]
    problems = list(_code_problems(own, path))
    merged: dict[str, Any] = {}
    includes = own.get("include", [])
    for included in [includes] if isinstance(includes, str) else includes:
        config, found = _read((path.parent / str(included)).absolute(), root, seen=(*seen, path))
        merged |= config
        problems += found
    return merged | own, problems


def _code_problems(config: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    for key in _CODE_KEYS:
        if config.get(key):
            yield Problem(str(path), f'the key "{key}" is refused: a task file of your own holds values, not code')
    for where, value in _scalars(config, ""):
        if where.endswith("hf_evaluate") and value is True:
            yield Problem(str(path), f"{where}: metrics that are scripts from a hub are refused")
        if where.endswith("trust_remote_code") and value:
            yield Problem(str(path), f"{where}: code that comes with a data set is never run")
        if isinstance(value, str) and ("{{" in value or "{%" in value) and _DUNDER.search(value):
            yield Problem(str(path), f"{where}: a template may not use names like {_DUNDER.findall(value)[0]}")


def _scalars(value: object, where: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _scalars(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _scalars(inner, f"{where}[{index}]")
    else:
        yield where, value
