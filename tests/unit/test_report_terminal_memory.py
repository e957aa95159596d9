"""What `plan --memory` prints, at every width: no number is cut, and what a line is about is said once."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest

from lora_lab.plan.devices import device_memory
from lora_lab.plan.fit import Fit
from lora_lab.plan.prediction import DeviceKind, Prediction
from lora_lab.report.terminal_memory import SECONDS, MemoryPlan, MemoryRow, bar_width, print_drawing, print_memory_plan
from lora_lab.report.text import clean
from tests.unit.test_report_terminal import Terminal, _plan_row

PARTS = {
    "weights": 13_476_831_232,
    "quantization_constants": 12_345_678,
    "adapter": 16_777_216,
    "gradients": 16_777_217,
    "optimizer_state": 33_554_432,
    "activations": 7_000_000_000,
    "temporary": 404_000_000,
    "allocator": 20_000_000,
}
NUMBERS = [
    "13.5 GB",
    "12.3 MB",
    "16.8 MB",
    "33.6 MB",
    "7.00 GB",
    "404 MB",
    "20.0 MB",
    "21.0 GB",
    "21.2 GB",
    "4,194,304",
]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def prediction(kind: DeviceKind = "cuda", paged: int = 0, note: str = "int8: an assumption") -> Prediction:
    return Prediction(
        device_kind=kind,
        style="own",
        trainable_parameters=4_194_304,
        total_parameters=6_742_609_920,
        peak_allocated_bytes=sum(PARTS.values()),
        peak_reserved_bytes=21_200_000_000 if kind == "cuda" else None,
        parts=PARTS,
        place="backward, head and loss",
        paged_bytes=paged,
        base_bytes=13_489_176_910,
        micro_batch_size=1,
        longest_row=1304,
        rows="the longest of 512 rows",
        how="traced in full",
        notes=(note,),
    )


def row(
    name: str, fit: Fit | None, predicted: Prediction | None, missing: Mapping[str, str] | None = None
) -> MemoryRow:
    return MemoryRow(
        _plan_row(name), predicted, fit, 75.0, {} if missing is None else missing, grounds="by 1 run like it"
    )


def plan(*rows: MemoryRow, kind: DeviceKind = "cuda") -> MemoryPlan:
    return MemoryPlan(rows, device_memory("h100"), kind)


def fit(headroom: int, largest: int | None = 4, more: int = 0) -> Fit:
    device = device_memory("h100")
    return Fit(device, headroom >= 0, 21_200_000_000 + device.context_bytes + more, headroom, largest, 9)


def printed(one: MemoryPlan, stream: io.StringIO | None = None) -> str:
    stream = io.StringIO() if stream is None else stream
    print_memory_plan(one, stream=stream)
    return stream.getvalue()


@pytest.mark.parametrize("width", [220, 120, 80, 60, 40, 20])
def test_no_width_of_a_terminal_cuts_a_number(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed(plan(row("lora-r8-qv-s0", fit(1_230_000_000), prediction())), Terminal())
    assert all(number in text for number in [*NUMBERS, "yes, 1.23 GB left"]) and "…" not in text
    if width >= 40:
        tables = text[: text.index("1 trials:")]
        assert max(len(clean(line)) for line in tables.splitlines()) <= width


def test_what_does_not_fit_says_how_much_is_short() -> None:
    text = printed(plan(row("lora", fit(-2_500_000_000, None), prediction())))
    (line, *_) = [one for one in text.splitlines() if one.startswith("lora")]
    assert line.split()[6:] == ["no,", "2.50", "GB", "short", "none", "9", "1", "min", "15", "s"]


def test_a_cpu_has_nothing_reserved_and_says_what_is_compared() -> None:
    cuda, cpu = (printed(plan(row("a", fit(1), prediction(kind)), kind=kind)) for kind in ("cuda", "cpu"))
    assert "reserved" in cuda.splitlines()[0] and "(558 MB of CUDA context)" in cuda
    assert "reserved" not in cpu and "fits: live tensors against all memory" in cpu
    for text in (cuda, cpu):
        assert "GB is 1e9 bytes, GiB is 2^30 bytes" in text and "79.11 GiB" in text


def test_what_is_counted_beside_reserved_is_told() -> None:
    text = printed(plan(row("a", fit(1, more=50_069_504), prediction())))
    assert "(558 MB of CUDA context, 50.1 MB of cuBLAS workspace that this device has more than most)" in text


def test_paged_states_have_a_column_where_there_are_any() -> None:
    assert "paged" not in printed(plan(row("a", fit(1), prediction())))
    text = printed(plan(row("a", fit(1), prediction(paged=33_554_432)), row("b", None, None, {"prediction": "no"})))
    assert "paged, beside it" in text and text.count("33.6 MB") == 2


def test_grounds_are_said_once_and_name_whom_they_are_about() -> None:
    refused = MemoryRow(_plan_row("c"), None, None, None, {"prediction": "beyond us", SECONDS: "no like run"})
    text = printed(plan(row("a", fit(1), prediction()), row("b", fit(1), prediction(note="another")), refused))
    lines = text.splitlines()
    for line in (
        "row lengths: the longest of 512 rows",
        "note: a: int8: an assumption",
        "note: b: another",
        "not predicted: c: beyond us",
        "no time here: c: no like run",
        "time here: by 1 run like it",
    ):
        assert lines.count(line) == 1, line


def test_a_drawing_is_plain_in_a_pipe_that_lacks_its_signs() -> None:
    class Latin(io.StringIO):
        encoding = "ascii"

    stream = Latin()
    print_drawing("lora", ["▁▂█"], "lab/plans/lora.html", stream=stream)
    assert stream.getvalue().isascii() and "page: lab/plans/lora.html" in stream.getvalue()
    assert bar_width(stream) == 100


def test_trials_of_one_name_are_told_apart() -> None:
    micro = [("rank=8", "training.micro_batch_size=1"), ("rank=8", "training.micro_batch_size=4")]
    same = [("rank=2",), ("rank=2",)]
    rows = [_plan_row("a", overrides=own) for own in micro]
    rows += [_plan_row("b", overrides=own, fingerprint=digit * 64) for own, digit in zip(same, "cd", strict=True)]
    rows += [_plan_row("alone", overrides=("seed=1",)), _plan_row("a-repeat", repeat=2)]
    text = printed(plan(*(MemoryRow(one, prediction(), fit(1), None, {}) for one in rows)))
    names = [line.split("  ")[0] for line in text.splitlines()[1:7]]
    assert names == [
        "a training.micro_batch_size=1",
        "a training.micro_batch_size=4",
        "b cccccccc",
        "b dddddddd",
        "alone",
        "a-repeat (repeat 2)",
    ]
