"""Which tasks the installed lm-eval has, read from its YAML files without importing it.

lm-eval's own index takes 12 to 18 seconds to build and imports torch; names must be checked before any model loads, so
the files are read here (about two seconds) and what is needed of them is kept in the cache, per version. Nothing in the
files is executed: `!function` stays a string.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from lora_lab.errors import InputError

_FORMAT = 1
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class OfficialTask(BaseModel):
    """One name of lm-eval: a task, or a group or tag that stands for several (`children`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["task", "group", "tag"]
    path: str | None  # of its YAML file; None for a tag
    children: tuple[str, ...]
    unsafe_code: bool  # scoring runs code that the model wrote
    num_fewshot: int | None
    splits: dict[str, str | None]


Catalogue = Mapping[str, OfficialTask]
_ENTRIES = TypeAdapter(dict[str, OfficialTask])


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe, and `!function` is read as the string that follows it."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def official_tasks(cache: Path) -> Catalogue:
    """All names of the installed lm-eval; read from `cache` where an earlier call left them.

    Raises:
        InputError: lm-eval is not installed.
    """
    root = _tasks_folder()
    store = cache / "lm_eval_tasks" / f"{metadata.version('lm_eval')}-{_FORMAT}.json"
    identity = str(root)
    if store.is_file():
        kept = _read(store, identity)
        if kept is not None:
            return kept
    entries = _scan(root)
    store.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"root": identity, "tasks": {name: entry.model_dump() for name, entry in entries.items()}})
    partial = store.with_name(f"{store.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(store)
    return entries


def leaves(catalogue: Catalogue, name: str) -> tuple[list[str], list[str]]:
    """The tasks that `name` stands for, and the groups passed on the way (itself included), each once, in order."""
    tasks: dict[str, None] = {}
    groups: dict[str, None] = {}

    def visit(current: str) -> None:
        entry = catalogue.get(current)
        if entry is None or current in groups:
            return
        if entry.kind == "task":
            tasks[current] = None
            return
        if entry.kind == "group":
            groups[current] = None
        for child in entry.children:
            visit(child)

    visit(name)
    return list(tasks), list(groups)


def _tasks_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError("lm_eval is not installed, so no task can be scored; install it, or use evaluation=heldout")
    return Path(spec.origin).parent / "tasks"


def _read(store: Path, identity: str) -> dict[str, OfficialTask] | None:
    """The kept catalogue; None where it is damaged or belongs to another installation."""
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        return _ENTRIES.validate_python(content["tasks"]) if content["root"] == identity else None
    except (ValueError, KeyError, TypeError):
        return None


def _scan(root: Path) -> dict[str, OfficialTask]:
    """Entries by name; where a name occurs twice the first file counts, in lm-eval's order of files."""
    entries: dict[str, OfficialTask] = {}
    tags: dict[str, list[str]] = {}
    parsed: dict[Path, dict[str, Any]] = {}
    for path in sorted(root.glob("**/*.yaml"), key=Path.as_posix):
        config = _with_includes(path, parsed)
        name = config.get("group") if _is_group(config) else config.get("task")
        if not isinstance(name, str) or name in entries:
            continue
        entries[name] = _entry(config, path)
        if entries[name].kind == "task":
            for tag in _names(config.get("tag")):
                tags.setdefault(tag, []).append(name)
    for tag, members in tags.items():
        if tag not in entries:
            empty = dict.fromkeys(_SPLITS)
            entries[tag] = OfficialTask(
                kind="tag", path=None, children=tuple(members), unsafe_code=False, num_fewshot=None, splits=empty
            )
    return entries


def _entry(config: Mapping[str, Any], path: Path) -> OfficialTask:
    members = config.get("task")
    is_group = _is_group(config)
    shots = config.get("num_fewshot")
    return OfficialTask(
        kind="group" if is_group else "task",
        path=str(path),
        children=tuple(_members(members)) if is_group else (),
        unsafe_code=config.get("unsafe_code") is True,
        num_fewshot=shots if isinstance(shots, int) else None,
        splits={key: value if isinstance(value := config.get(key), str) else None for key in _SPLITS},
    )


def _is_group(config: Mapping[str, Any]) -> bool:
    return "class" not in config and "group" in config


def _with_includes(path: Path, parsed: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The mapping of a file with its includes below it, as lm-eval merges them; empty where the file is unusable."""
    if path in parsed:
        return parsed[path]
    parsed[path] = {}  # also ends a cycle of includes
    try:
        with path.open("rb") as stream:
            own = yaml.load(stream, Loader=_Loader)  # a safe loader
    except (OSError, yaml.YAMLError):
        own = None
    if not isinstance(own, dict):
        return parsed[path]
    merged: dict[str, Any] = {}
    for included in _names(own.get("include")):
        merged |= _with_includes((path.parent / included).resolve(), parsed)
    parsed[path] = merged | own
    return parsed[path]


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _members(value: object) -> Iterable[str]:
    for item in value if isinstance(value, list) else []:
        name = item.get("task", item.get("group")) if isinstance(item, dict) else item
        if isinstance(name, str):
            yield name
