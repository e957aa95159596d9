"""The layer log: what is observed of layers, experts and routers at intervals of a training, one JSON line each.

A line holds `step` (finished optimizer steps), `kind` (what was observed) and its values by layer or module. A number
that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.record.atomic import disk_error, write_bytes
from lora_lab.record.step_log import lines_up_to

# Intervals of a training at whose ends its layers are looked at.
INTERVALS = 4


def observed_steps(total_steps: int) -> frozenset[int]:
    """The steps after which layers are looked at: the ends of INTERVALS parts of the training."""
    return frozenset(math.ceil(total_steps * part / INTERVALS) for part in range(1, INTERVALS + 1))


def write_observation(path: Path, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """Appends one line and puts it on disk; raises MachineError where the disk refuses."""
    line = json.dumps({"step": step, "kind": kind, **_finite(values)}, allow_nan=False)
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(error, path=path) from error


def read_observations(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, in order; none where there is no log. An unfinished last line is passed over."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    lines = [json.loads(line) for line in whole]
    return [line for line in lines if line["kind"] == kind]


def copy_observations(old: Path, new: Path, *, up_to: int) -> int:
    """Begins the layer log `new` with the lines of `old` up to step `up_to`, byte for byte; returns how many.

    For a run that goes on from a checkpoint of step `up_to`. No file is made where there is nothing to copy.

    Raises:
        DataError: a line of `old` is damaged (an unfinished last one is left out); `new` is then not written.
        MachineError: the disk refuses.
    """
    kept = lines_up_to(old, up_to)
    if kept:
        write_bytes(new, b"".join(line for _, line in kept))
    return len(kept)


def observed_updates(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """The updates of a run's observations of kind `norms`, those that have one."""
    return [line["update"] for line in lines if line.get("update")]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
