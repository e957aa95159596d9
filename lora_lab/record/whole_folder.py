"""Folders that are there complete or not at all, and why a file is not what its name says."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from lora_lab.record.atomic import TEMPORARY_SUFFIX, disk_error, sync_folder, sync_tree


def write_whole_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Has `write(temporary)` fill a folder beside `folder`, puts it on disk and renames it; nothing is left on failure.

    Raises:
        MachineError: the disk refuses.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        sync_tree(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise disk_error(error, path=folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def looks_like(file: Path) -> str | None:
    """The usual reasons: a download that was not one, a pickle under another name; None where none applies."""
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, the file itself was not downloaded (git lfs pull)"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it looks like a pickle under another name"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it looks like an HTML page (failed download?)"
    return None
