"""A checkpoint: the state of an unfinished training in one folder, in which there is always a complete one.

checkpoint/
    checkpoint.json                 the small parts, and name, size and SHA-256 of the file that holds the tensors
    tensors-<digits>.safetensors    the tensors

`checkpoint.json` is replaced atomically once the new tensors are on disk; only then the older tensors are removed. A
process that is killed at any moment leaves the older checkpoint or the newer, and at most a file that no checkpoint
names, which the next one removes. Every byte is under a digest, so that a damaged checkpoint is never gone on from.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_lab.errors import DataError, LabError, Problem
from lora_lab.record.atomic import disk_error, make_folder, read_json, sync_tree, write_json

CHECKPOINT_FOLDER = "checkpoint"
MANIFEST_FILE = "checkpoint.json"
# Raised by one whenever an older lab could not go on from what is written here, or this one from what that wrote.
SCHEMA_VERSION = 1


def write_checkpoint(folder: Path, state: Mapping[str, Any], write_tensors: Callable[[Path], object]) -> int:
    """Makes `state` and what `write_tensors(path)` writes the checkpoint of `folder`; returns its bytes on disk.

    state: JSON values without NaN. The folder is made where it is missing; while the new tensors are written it holds
    the older ones as well.

    Raises:
        MachineError: the disk refuses; the older checkpoint is then still there.
    """
    make_folder(folder)
    tensors = folder / f"tensors-{secrets.token_hex(4)}.safetensors"
    try:
        write_tensors(tensors)
        sync_tree(folder)
        size = tensors.stat().st_size
        file = {"name": tensors.name, "bytes": size, "sha256": _file_digest(tensors)}
        content = {"schema_version": SCHEMA_VERSION, "state": dict(state), "tensors": file}
        write_json(folder / MANIFEST_FILE, content | {"sha256": _digest(content)})
        return size + (folder / MANIFEST_FILE).stat().st_size
    except OSError as error:
        raise disk_error(error, path=tensors) from error
    finally:
        _remove_unnamed(folder)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Path]:
    """The state of a checkpoint and the path of its tensors, once every byte of both is known to be what was written.

    Raises:
        DataError: there is none, it was written by another version of the lab, or it is damaged.
        MachineError: it is there and cannot be read.
    """
    path = folder / MANIFEST_FILE
    content = read_json(path)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(Problem(str(path), f"expected schema_version {SCHEMA_VERSION}, got {version!r}"))
    if content.pop("sha256", None) != _digest(content):
        raise DataError(Problem(str(path), "damaged: the content is not what was written (SHA-256)"))
    file = content["tensors"]
    tensors = folder / file["name"]
    try:
        if not tensors.is_file():
            raise DataError(Problem(str(tensors), "not found"))
        if (size := tensors.stat().st_size) != file["bytes"]:
            raise DataError(Problem(str(tensors), f"damaged: {size} bytes, {file['bytes']} were written"))
        if _file_digest(tensors) != file["sha256"]:
            raise DataError(Problem(str(tensors), "damaged: the content is not what was written (SHA-256)"))
    except OSError as error:
        raise disk_error(error, path=tensors) from error
    return content["state"], tensors


def is_complete(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder` that can be read and is undamaged; reads all of it."""
    try:
        read_checkpoint(folder)
    except LabError:
        return False
    return True


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint and what an interrupted one left in its folder; no folder is fine.

    Raises:
        MachineError: the disk refuses.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(error, path=folder) from error


def _remove_unnamed(folder: Path) -> None:
    """Removes what the checkpoint that is there now, the older or the newer, does not consist of."""
    try:
        kept = read_json(folder / MANIFEST_FILE)["tensors"]["name"]
    except (LabError, KeyError, TypeError):
        kept = None
    try:
        for entry in folder.iterdir():
            if entry.name not in (MANIFEST_FILE, kept):
                entry.unlink()
    except OSError as error:
        raise disk_error(error, path=folder) from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
