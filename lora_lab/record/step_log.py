"""The step log: one JSON line per optimizer step, flushed at once, so that a killed run leaves its curve behind.

JSON has no NaN. A number that is not finite is left out of the line and named under `nonfinite`, as text:
`{"step": 7, "loss_tokens": 812, "nonfinite": {"loss": "NaN"}}`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_lab.errors import DataError, Problem
from lora_lab.record.atomic import disk_error, write_bytes

NONFINITE = "nonfinite"


class StepLog:
    """Appends to `path`. Keys carry units where they have one (`seconds`, `allocated_bytes`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(error, path=path) from error

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Log optimizer step `step`; a None value (not measured) is left out.

        Raises:
            MachineError: the disk refuses.
        """
        line = json.dumps(_line(step, values), allow_nan=False).encode() + b"\n"
        unwritten = memoryview(line)
        try:
            while unwritten:
                unwritten = unwritten[self._stream.write(unwritten) or 0 :]
        except OSError as error:
            raise disk_error(error, path=self.path, needed_bytes=len(line)) from error

    def sync(self) -> None:
        """Put the log on disk: before a checkpoint is written, so that no power cut leaves it without its curve.

        Raises:
            MachineError: the disk refuses.
        """
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise disk_error(error, path=self.path) from error

    def close(self) -> None:
        """Put the log on disk; doing so twice is fine."""
        if self._stream.closed:
            return
        try:
            self.sync()
        finally:
            self._stream.close()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _line(step: int, values: Mapping[str, float | int | None]) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step}
    nonfinite: dict[str, str] = {}
    for name, value in values.items():
        if value is None:
            continue
        if math.isfinite(value):
            line[name] = value
        else:
            nonfinite[name] = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if nonfinite:
        line[NONFINITE] = nonfinite
    return line


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a step log in order; a torn last line (the run was killed while writing) is left out.

    Raises:
        DataError: any other line is damaged; `where` is `path:line`.
        MachineError: the file cannot be read.
    """
    return [value for value, _ in _whole_lines(path)]


def copy_steps(old: Path, new: Path, *, up_to: int) -> int:
    """Begins the step log `new` with the lines of steps 1 to `up_to` of `old`, byte for byte; returns how many.

    For a run that goes on from a checkpoint of step `up_to`: what an earlier attempt logged after it is taken again.

    Raises:
        DataError: `old` does not hold each of these steps once and in order, or is damaged; `new` is then not written.
        MachineError: the disk refuses.
    """
    kept = lines_up_to(old, up_to)
    if [step for step, _ in kept] != list(range(1, up_to + 1)):
        raise DataError(Problem(str(old), f"does not hold each of the steps 1 to {up_to} once"))
    write_bytes(new, b"".join(line for _, line in kept))
    return len(kept)


def lines_up_to(path: Path, step: int) -> list[tuple[int, bytes]]:
    """Step and bytes of each line of a log whose `step` is at most this one, in order; none where there is no log.

    Raises:
        DataError: a line is damaged (an unfinished last one is left out) or names no step; `where` is `path:line`.
        MachineError: the file cannot be read.
    """
    if not path.exists():
        return []
    found = []
    for number, (value, line) in enumerate(_whole_lines(path), start=1):
        at = value.get("step")
        if not isinstance(at, int):
            raise DataError(Problem(f"{path}:{number}", f"expected a step, got {str(at)[:50]}"))
        if at <= step:
            found.append((at, line))
    return found


def _whole_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise disk_error(error, path=path) from error
    *complete, _torn = content.split(b"\n")
    return [(_parsed(line, f"{path}:{number}"), line + b"\n") for number, line in enumerate(complete, start=1)]


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(where, f"damaged line: {error}")) from None
    if not isinstance(value, dict):
        raise DataError(Problem(where, f"expected a JSON object, got {type(value).__name__}"))
    return value
