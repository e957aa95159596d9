"""Reads the `.wandb` file of a run: LevelDB's log format around protobuf records. wandb 0.31 has no reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK_BYTES = 32768
_FILE_HEADER_BYTES = 7
_RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, part
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class LoggedRun:
    """What a `.wandb` file says. `rows` without wandb's own keys; `exit_code` is None where the run was not ended."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read_wandb_file(path: Path) -> LoggedRun:
    """The records of a file, put together."""
    logged = LoggedRun()
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        _add(logged, record)
    return logged


def _add(logged: LoggedRun, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        logged.run = record.run
        logged.config.update(_pairs(record.run.config.update))
    elif kind == "config":
        logged.config.update(_pairs(record.config.update))
    elif kind == "history":
        row = _pairs(record.history.item)
        logged.rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    elif kind == "summary":
        logged.summary.update(_pairs(record.summary.update))
    elif kind == "metric":
        logged.metrics[record.metric.name or record.metric.glob_name] = record.metric
    elif kind == "exit":
        logged.exit_code = record.exit.exit_code


def _pairs(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    offset, parts = _FILE_HEADER_BYTES, b""
    while offset + _RECORD_HEADER.size <= len(content):
        left = _BLOCK_BYTES - offset % _BLOCK_BYTES
        if left < _RECORD_HEADER.size:
            offset += left
            continue
        _, length, part = _RECORD_HEADER.unpack_from(content, offset)
        offset += _RECORD_HEADER.size
        parts = (b"" if part in (_WHOLE, _FIRST) else parts) + content[offset : offset + length]
        offset += length
        if part in (_WHOLE, _LAST):
            yield parts


def offline_runs(root: Path) -> dict[str, LoggedRun]:
    """The offline runs below a lab's folder by id; two folders of one id are a fault."""
    found: dict[str, LoggedRun] = {}
    for path in sorted((root / "wandb").glob("offline-run-*/*.wandb")):
        run_id = path.stem.removeprefix("run-")
        assert run_id not in found, f"two folders of {run_id}"
        found[run_id] = read_wandb_file(path)
    return found
