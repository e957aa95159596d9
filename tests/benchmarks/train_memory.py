"""Live bytes of a step at its peak: one run against cohorts of more and more members, at the same tokens per forward.

Rows of one length alone are used, so that a forward of n members with 16 / n rows each has the very tokens of one run
with 16 rows. What is left between them is what a member costs of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lora_lab.data.encode import Encoded
from lora_lab.memory.live_bytes import LiveBytes, storage_bytes
from tests.benchmarks.train_rows import Case
from tests.benchmarks.train_sides import Side, lab_side

ROWS = 16
MEMBERS = (1, 2, 4, 8, 16)


def same_length(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows of the length that most have."""
    (length, _), *_ = Counter(len(row.input_ids) for row in rows).most_common(1)
    return [row for row in rows if len(row.input_ids) == length]


def memory(model: str, target: str, rows: Sequence[Encoded], cache: Path, *, members: Sequence[int]) -> dict[str, Any]:
    """Peaks of a cohort of each size (1: a run alone) by number of members.

    persistent_bytes: what lives between steps. further_member_bytes: by which the peak grows per member, from the least
    cohort to the largest; further_member_persistent_bytes: the same of what lives between steps.
    """
    chosen = same_length(rows)
    peaks: dict[int, int] = {}
    persistent: dict[int, int] = {}
    for count in members:
        case = Case(model, target, ROWS // count, batch=ROWS // count)
        peaks[count], persistent[count] = peak_of(lab_side(case.trials(count), chosen, cache))
    return {
        "model": model,
        "target": target,
        "rows": ROWS,
        "row_tokens": len(chosen[0].input_ids),
        "peak_bytes": _named(peaks),
        "persistent_bytes": _named(persistent),
        "ratio": _named({count: peak / peaks[1] for count, peak in peaks.items()}),
        "further_member_bytes": _slope(peaks),
        "further_member_persistent_bytes": _slope(persistent),
    }


def peak_of(side: Side) -> tuple[int, int]:
    """Live bytes at the peak of a step from the second on, and between steps."""
    side.step()  # creates the optimizer's state
    kept = side.tensors()
    with LiveBytes([("weights", kept)]) as counter:
        side.step()
    return counter.peak_bytes, storage_bytes(kept)


def _named(values: Mapping[int, float]) -> dict[str, float]:
    """With keys that are the same in a JSON file."""
    return {str(count): value for count, value in values.items()}


def _slope(values: dict[int, int]) -> float | None:
    least, most = min(values, default=0), max(values, default=0)
    return (values[most] - values[least]) / (most - least) if most > least else None


def serve_memory(connection: Connection, asked: dict[str, Any]) -> None:
    """`memory(**asked)` in a process of its own."""
    connection.send(memory(**asked))
