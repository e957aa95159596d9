"""Files that are either whole or not there: temporary name in the same folder, fsync, rename, fsync of the folder.

A crash at any point leaves the old file or the new one. A disk that refuses becomes one MachineError line that names
the path, the bytes needed and the bytes free, and leaves no torso behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, NoReturn

from lora_lab.errors import DataError, MachineError, Problem

TEMPORARY_SUFFIX = ".tmp"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON with sorted keys, atomically.

    Raises:
        ValueError: where `value` holds NaN or an infinity, or something JSON has no form for.
        MachineError: the disk refuses.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be written as JSON: {error}") from error
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically; lone surrogates (undecodable file names) are written as escapes."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """`content`, atomically: after return it is on disk under `path`. Missing parent folders are made.

    Raises:
        MachineError: the disk refuses; nothing is left behind and an earlier file at `path` is untouched.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)  # first, so that its space counts as free
        raise disk_error(error, path=path, needed_bytes=len(content)) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """The folder and its parents, durably; an existing folder is fine.

    Raises:
        MachineError: a file is in the way, or the disk refuses.
    """
    if path.is_dir():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path=path) from error


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable. File systems that cannot sync a folder are left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """fsync every regular file and folder below `path`, so that what other libraries wrote is on disk as well.

    Raises:
        MachineError: a file cannot be read, or the disk refuses.
    """
    try:
        for folder, _, names in os.walk(path):
            for name in names:
                file = Path(folder, name)
                if file.is_file() and not file.is_symlink():
                    _sync_file(file)
            sync_folder(Path(folder))
    except OSError as error:
        raise disk_error(error, path=path) from error


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, *, path: Path, needed_bytes: int | None = None) -> MachineError:
    """The one line that a refusing disk is answered with."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        needed = "" if needed_bytes is None else f"; needs {needed_bytes} bytes"
        free = _free_bytes(path)
        reason += needed + ("" if free is None else f", {free} bytes are free")
    return MachineError(Problem(str(path), reason))


def _free_bytes(path: Path) -> int | None:
    for folder in path.parents:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def read_json(path: Path) -> Any:
    """The value of a strict JSON file (no NaN, no infinities).

    Raises:
        DataError: no such file, or damaged; `where` is `path` or `path:line`.
        MachineError: it exists but cannot be read.
    """
    content = bytes_if_there(path)
    if content is None:
        raise DataError(Problem(str(path), "no such file"))
    return parse_json(content, path)


def bytes_if_there(path: Path) -> bytes | None:
    """The file's content, or None where there is no such file.

    Raises:
        MachineError: it exists but cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_error(error, path=path) from error


def parse_json(content: bytes, path: Path) -> Any:
    """The value of a strict JSON file's content; raises DataError like `read_json`."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"damaged JSON: {error.msg} (column {error.colno})"
        raise DataError(Problem(f"{path}:{error.lineno}", message)) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(Problem(f"{path}:{line}", f"damaged: not UTF-8 text ({error.reason})")) from None
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(str(path), f"damaged JSON: {error}")) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
