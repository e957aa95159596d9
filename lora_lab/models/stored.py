"""Model folders that the lab makes itself, kept in the cache: written once, checked at every use.

A folder is written under a temporary name and renamed, so it is there complete or not at all; its manifest (file names,
sizes, SHA-256) is written last. A lock file keeps two processes from making the same folder at once.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError

from lora_lab.errors import DataError, IdentityError, MachineError, Problem
from lora_lab.record.atomic import disk_error, read_json, write_json
from lora_lab.record.whole_folder import write_whole_folder

MANIFEST = "manifest.json"


def stored_folder(cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder `cache/models/name`; made by `write(folder)` if it is not there yet.

    Raises:
        IdentityError: a file of a folder made earlier is missing or has changed.
        MachineError: the disk refuses.
    """
    models = cache / "models"
    folder = models / name
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{name}.lock"):
            if not folder.exists():
                write_whole_folder(folder, lambda temporary: _write_with_manifest(temporary, write))
    except OSError as error:
        raise disk_error(error, path=folder) from error
    except SafetensorError as error:
        raise MachineError(Problem(str(folder), f"cannot be written: {error}")) from error
    check_stored(folder)
    return folder


def check_stored(folder: Path) -> None:
    """Compares sizes (every time) and SHA-256 (once per process and file state) with the manifest.

    Raises:
        IdentityError: naming every file that differs.
    """
    advice = f"delete {folder} and it is made again"
    try:
        files = read_json(folder / MANIFEST)["files"].items()
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise IdentityError(Problem(str(folder / MANIFEST), f"not readable ({error}); {advice}")) from error
    problems = []
    for name, declared in files:
        found = _state(folder / name)
        if found != (declared["size_bytes"], declared["sha256"]):
            problems.append(Problem(str(folder / name), f"missing or changed since it was made; {advice}"))
    if problems:
        raise IdentityError(problems)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, str] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, _sha256_once(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_once(path: Path, size_bytes: int, modified_ns: int) -> str:
    return sha256_of(path)


def _write_with_manifest(folder: Path, write: Callable[[Path], None]) -> None:
    write(folder)
    paths = sorted(folder.iterdir())
    files = {path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    write_json(folder / MANIFEST, {"files": files})


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
