"""What `plan --memory` prints: what every trial is predicted to take, whether it fits, and what that rests on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from lora_lab.plan.devices import DeviceMemory
from lora_lab.plan.fit import Fit
from lora_lab.plan.prediction import DeviceKind, Prediction
from lora_lab.plan.row import PlanRow
from lora_lab.plan.timeline import PARTS
from lora_lab.report.grid import Column, Grid, console_for, print_grid, print_line
from lora_lab.report.terminal import plan_counts, plan_json
from lora_lab.report.text import UNKNOWN, bytes_text, count_text, seconds_text

PEAK = "predicted_peak_allocated_bytes"
SECONDS = "predicted_train_seconds"
_TITLES = {"quantization_constants": "constants", "optimizer_state": "optimizer"}
_NAMED = 3
_ID_DIGITS = 8
_WIDEST = 100
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """A line of a plan with what is predicted of it; all None for a duplicate.

    train_seconds: on this machine, whatever device the memory is of; grounds: what it rests on. page: the file of its
    explanation. missing: why something is None, under `prediction`, `fit` and `predicted_train_seconds`.
    """

    row: PlanRow
    prediction: Prediction | None
    fit: Fit | None
    train_seconds: float | None
    missing: Mapping[str, str]
    grounds: str | None = None
    page: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """kind: which of the two ways of counting the predictions follow."""

    rows: tuple[MemoryRow, ...]
    device: DeviceMemory
    kind: DeviceKind


def print_memory_plan(plan: MemoryPlan, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """A table of sizes and one of their parts, then device, units and assumptions; as JSON, the rows of the plan."""
    if as_json:
        target = sys.stdout if stream is None else stream
        json.dump([memory_json(row) for row in plan.rows], target, indent=2, allow_nan=False, ensure_ascii=False)
        target.write("\n")
        return
    console = console_for(stream)
    shown = [row for row in plan.rows if row.row.state != "duplicate"]
    labels = _labels([row.row for row in shown])
    print_grid(console, _sizes(shown, labels, plan.kind))
    print_line(console, "")
    print_grid(console, _parts(shown, labels))
    print_line(console, plan_counts([row.row for row in plan.rows]))
    for line in [*_device_lines(plan), *_grounds(shown, labels), *_missing_lines(shown, labels)]:
        print_line(console, line, style="dim")


def bar_width(stream: TextIO | None = None) -> int:
    """Characters that a drawing may be wide."""
    return min(console_for(stream).width - 2, _WIDEST)


def print_drawing(name: str, bars: Sequence[str], page: str, *, stream: TextIO | None = None) -> None:
    """A trial's step in text, and where its page is."""
    console = console_for(stream)
    print_line(console, "")
    print_line(console, name, style="bold")
    for line in bars:
        print_line(console, line)
    print_line(console, f"page: {page}")


def memory_json(row: MemoryRow) -> dict[str, Any]:
    """A row of the plan, its predicted peak beside the counts, and under `memory` all that is predicted."""
    prediction, plain = row.prediction, plan_json(row.row)
    missing = dict(plain["missing"])
    if prediction is None:
        missing[PEAK] = row.missing.get("prediction", "a duplicate: see the first of its kind")
    memory: dict[str, Any] | None = None
    if row.row.state != "duplicate":
        memory = {
            **({} if prediction is None else prediction.to_json()),
            "fit": None if row.fit is None else asdict(row.fit),
            SECONDS: row.train_seconds,
            "predicted_train_seconds_by": row.grounds,
            "page": row.page,
            "missing": dict(row.missing),
        }
    peak = None if prediction is None else prediction.peak_allocated_bytes
    return {**plain, "missing": missing, PEAK: peak, "memory": memory}


def _labels(rows: Sequence[PlanRow]) -> list[str]:
    """Names; where several trials have one, each with the overrides that not all of them have, or with its id."""
    alike: dict[str, list[PlanRow]] = {}
    for row in rows:
        alike.setdefault(row.name, []).append(row)
    return [_label(row, alike[row.name]) for row in rows]


def _label(row: PlanRow, alike: Sequence[PlanRow]) -> str:
    repeat = [f"(repeat {row.repeat})"] if row.repeat else []
    own = [one for one in row.overrides if not all(one in other.overrides for other in alike)]
    if len(alike) > 1 and sum(other.overrides == row.overrides for other in alike) > 1:
        own = [row.fingerprint[:_ID_DIGITS]]
    return " ".join([row.name, *own, *repeat])


def _sizes(rows: Sequence[MemoryRow], labels: Sequence[str], kind: DeviceKind) -> Grid:
    is_cuda = kind == "cuda"
    columns = (
        Column("run"),
        Column("trainable", is_number=True),
        Column("peak allocated", is_number=True),
        *([Column("reserved", is_number=True)] if is_cuda else []),
        Column("fits"),
        Column("largest micro-batch", is_number=True),
        Column("side by side", is_number=True),
        Column("time here", is_number=True, is_optional=True),
    )
    return Grid(columns, tuple((label, *_size_cells(row, is_cuda)) for label, row in zip(labels, rows, strict=True)))


def _size_cells(row: MemoryRow, is_cuda: bool) -> tuple[str, ...]:
    prediction, fit = row.prediction, row.fit
    trainable = row.row.trainable_parameters if prediction is None else prediction.trainable_parameters
    return (
        count_text(trainable),
        bytes_text(None if prediction is None else prediction.peak_allocated_bytes),
        *([bytes_text(None if prediction is None else prediction.peak_reserved_bytes)] if is_cuda else []),
        UNKNOWN if fit is None else fit_text(fit),
        UNKNOWN if fit is None else "none" if fit.largest_micro_batch is None else count_text(fit.largest_micro_batch),
        UNKNOWN if fit is None else count_text(fit.side_by_side),
        seconds_text(row.train_seconds),
    )


def fit_text(fit: Fit) -> str:
    """`yes, 3.21 GB left` or `no, 1.20 GB short`."""
    if fit.fits:
        return f"yes, {bytes_text(fit.headroom_bytes)} left"
    return f"no, {bytes_text(-fit.headroom_bytes)} short"


def _parts(rows: Sequence[MemoryRow], labels: Sequence[str]) -> Grid:
    is_paged = any(row.prediction is not None and row.prediction.paged_bytes for row in rows)
    columns = (
        Column("of the peak"),
        *(Column(_TITLES.get(part, part), is_number=True) for part in PARTS),
        *([Column("paged, beside it", is_number=True)] if is_paged else []),
        Column("in", is_optional=True),
    )
    return Grid(columns, tuple((label, *_part_cells(row, is_paged)) for label, row in zip(labels, rows, strict=True)))


def _part_cells(row: MemoryRow, is_paged: bool) -> tuple[str, ...]:
    prediction = row.prediction
    if prediction is None:
        return (UNKNOWN,) * (len(PARTS) + is_paged + 1)
    paged = [bytes_text(prediction.paged_bytes)] if is_paged else []
    return (*(bytes_text(prediction.parts[part]) for part in PARTS), *paged, prediction.place)


def _device_lines(plan: MemoryPlan) -> list[str]:
    device = plan.device
    gib = device.total_bytes / _GIB
    lines = [f"device: {device.name}, {bytes_text(device.total_bytes)} ({gib:.2f} GiB) in all; {device.source}"]
    if plan.kind == "cuda":
        lines.append(f"fits: reserved, and what is in no other column ({_beside(plan)}), against all of the device")
    else:
        lines.append("fits: live tensors against all memory; Python and its libraries are in no column")
    return [*lines, "GB is 1e9 bytes, GiB is 2^30 bytes; the parts add up to peak allocated"]


def _beside(plan: MemoryPlan) -> str:
    told = [f"{bytes_text(plan.device.context_bytes)} of CUDA context"]
    more = {
        row.fit.needed_bytes - plan.device.context_bytes - row.prediction.peak_reserved_bytes
        for row in plan.rows
        if row.fit is not None and row.prediction is not None and row.prediction.peak_reserved_bytes is not None
    }
    told += [f"{bytes_text(one)} of cuBLAS workspace that this device has more than most" for one in more if one]
    return ", ".join(told)


def _grounds(rows: Sequence[MemoryRow], labels: Sequence[str]) -> list[str]:
    named = list(zip(labels, rows, strict=True))
    told = [(name, row.prediction) for name, row in named if row.prediction is not None]
    lines = _by_text("row lengths", [(name, one.rows) for name, one in told])
    lines += _by_text("step", [(name, f"{one.style}, {one.how}") for name, one in told])
    lines += _by_text("time here", [(name, row.grounds) for name, row in named if row.grounds is not None])
    return lines + _by_text("note", [(name, note) for name, one in told for note in one.notes], out_of=len(told))


def _missing_lines(rows: Sequence[MemoryRow], labels: Sequence[str]) -> list[str]:
    def of(key: str) -> list[tuple[str, str]]:
        return [(name, row.missing[key]) for name, row in zip(labels, rows, strict=True) if key in row.missing]

    titles = {"prediction": "not predicted", "fit": "not known whether it fits", SECONDS: "no time here"}
    return [line for key, title in titles.items() for line in _by_text(title, of(key), out_of=len(rows))]


def _by_text(title: str, told: Sequence[tuple[str, str]], *, out_of: int | None = None) -> list[str]:
    """A line per distinct text, with the names it is about where that is not all of them."""
    names: dict[str, list[str]] = {}
    for name, text in told:
        names.setdefault(text, []).append(name)
    total = len(told) if out_of is None else out_of
    return [f"{title}: {text}" if len(of) == total else f"{title}: {_list(of)}: {text}" for text, of in names.items()]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
