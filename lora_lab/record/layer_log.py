"""The layer log: what is observed of layers, experts and routers at intervals of a training, one JSON line each.

A line holds `step` (finished optimizer steps), `kind` (what was observed) and its values by layer or module. A number
that is not finite is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.record.atomic import disk_error

# Intervals of a training at whose ends its layers are looked at.
INTERVALS = 4


def observed_steps(total_steps: int) -> frozenset[int]:
    """The steps after which layers are looked at: the ends of INTERVALS parts of the training."""
    return frozenset(math.ceil(total_steps * part / INTERVALS) for part in range(1, INTERVALS + 1))


def write_observation(path: Path, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """Appends one line; raises MachineError where the disk refuses."""
    line = json.dumps({"step": step, "kind": kind, **_finite(values)}, allow_nan=False)
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
    except OSError as error:
        raise disk_error(error, path=path) from error


def read_observations(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, in order; none where there is no log. An unfinished last line is passed over."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    lines = [json.loads(line) for line in whole]
    return [line for line in lines if line["kind"] == kind]


def observed_updates(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """The updates of a run's observations of kind `norms`, those that have one."""
    return [line["update"] for line in lines if line.get("update")]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
