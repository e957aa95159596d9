"""SHA-256 of files and folders, remembered by path, size and times so that a large file is read once.

The memory is one JSON file of the cache. It only saves time: it may be deleted, and a damaged one is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.plan.paths import existing

_CHUNK_BYTES = 1 << 20
# A file changed this recently may change again without a new time stamp, so its hash is not remembered.
_SETTLED_NS = 2_000_000_000


def hash_file(path: str | Path, *, where: str, cache: Path | None) -> str:
    """SHA-256 (hex) of a file's bytes.

    Args:
        where: the key that named the file, for messages.
        cache: folder whose `identities.json` remembers hashes; None always reads the file.

    Raises:
        InputError: no such file, not readable, or changed while it was read.
    """
    found = existing(Path(path), where=where, kind="file").resolve()
    stamp = _stamp(found)
    memory = None if cache is None else cache / "identities.json"
    known = _entries(memory).get(str(found)) if memory is not None else None
    if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    digest = _read_hash(found, where)
    if _stamp(found) != stamp:
        raise InputError(Problem(where, f'"{found}" changed while it was read; try again when it is complete'))
    if memory is not None and time.time_ns() - max(stamp[1:]) > _SETTLED_NS:
        _remember(memory, str(found), {"stamp": stamp, "sha256": digest})
    return digest


def hash_folder(path: str | Path, patterns: Sequence[str], *, where: str, cache: Path | None) -> str:
    """SHA-256 (hex) over the sorted (file name, SHA-256) of a folder's files that match one of the glob patterns.

    Sub-folders are searched only by a pattern that says so (`**/*.yaml`); names are relative to the folder.

    Raises:
        InputError: no such folder, no file that matches, or a file that `hash_file` refuses.
    """
    folder = existing(Path(path), where=where, kind="folder")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise InputError(Problem(where, f'"{folder}" has no file that matches {", ".join(patterns)}'))
    rows = sorted((file.relative_to(folder).as_posix(), hash_file(file, where=where, cache=cache)) for file in files)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _stamp(path: Path) -> list[int]:
    """Size and both times: the inode's catches a replacement that kept the other two."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_hash(path: Path, where: str) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise InputError(Problem(where, f'cannot read "{path}": {error.strerror}')) from None
    return digest.hexdigest()


def _entries(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(memory: Path, key: str, entry: dict[str, Any]) -> None:
    """Read again before writing: of two writers at once one may lose its entry, never the file its form."""
    content = _entries(memory) | {key: entry}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, prefix=".identities-", delete=False) as stream:
            temporary = Path(stream.name)
            try:
                json.dump(content, stream, indent=1, sort_keys=True)
                stream.flush()
                os.fsync(stream.fileno())
                temporary.replace(memory)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(Problem(str(memory), f"cannot write: {error.strerror}")) from None
