"""Paths that a user named: found, or refused with the names that lie beside the missing one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from lora_lab.errors import InputError, Problem

_SHOWN_NAMES = 10


def existing(path: Path, *, where: str, kind: Literal["file", "folder"]) -> Path:
    """The path with `~` expanded; `where` is the key that named it, for messages.

    Raises:
        InputError: no such path, or a file where a folder is needed and the reverse; with the nearest names beside it.
    """
    path = path.expanduser()
    try:
        exists, is_right = path.exists(), path.is_dir() if kind == "folder" else path.is_file()
    except (OSError, ValueError) as error:  # a name too long, a NUL inside, a folder that may not be entered
        raise InputError(Problem(where, f'cannot look at "{str(path)[:100]}": {error}')) from None
    if is_right:
        return path
    if exists:
        raise InputError(Problem(where, f'expected a {kind}, but "{path}" is not one'))
    raise InputError(Problem(where, f'no such {kind}: "{path}"{_beside(path)}'))


def _beside(path: Path) -> str:
    """The nearest names in the deepest folder that does exist, since a folder may hold thousands."""
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    folder = missing.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    hint = f'; did you mean "{folder / close[0]}"?' if close else ""
    more = ", ..." if len(names) > _SHOWN_NAMES else ""
    listed = ", ".join(names[:_SHOWN_NAMES]) or "nothing"
    return f"{hint} ({folder} holds: {listed}{more})"
