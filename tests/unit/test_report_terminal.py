"""What commands print, in a pipe and in a terminal, and that nothing in a name can act on the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lora_lab.plan.row import PlanRow
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord, read_record
from lora_lab.report.grid import Column, Grid, console_for, print_grid
from lora_lab.report.terminal import print_comparison, print_plan, print_runs, print_table
from lora_lab.report.text import (
    bytes_text,
    clean,
    encodable,
    interval_text,
    number_text,
    points_text,
    seconds_text,
)
from lora_lab.study.compare import compare_runs
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import ended, loss, trial_of


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Latin(io.StringIO):
    """A pipe that cannot carry every sign."""

    encoding = "ascii"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def _records(root: Path) -> list[RunRecord]:
    records = [
        ended(
            root,
            trial_of(seed=seed, rank=rank),
            metrics={
                "heldout/loss": loss(value),
                "skills_unseen/acc": loss(0.5 + value / 100, higher_is_better=True, chance=0.25),
            },
            measurements={"peak_allocated_bytes": 1_234_567_890, "train_seconds": 75.0},
            facts={"executed": "alone"},
            trainable_parameters=4_194_304,
        )
        for rank, values in ((8, [2.63, 2.71, 2.79]), (16, [2.7, 2.75]))
        for seed, value in enumerate(values)
    ]
    return [*records, ended(root, trial_of(seed=2, rank=16), status=Status.DIVERGED, reason="loss is NaN")]


def test_table_in_a_pipe_is_plain_and_whole(tmp_path: Path) -> None:
    stream = io.StringIO()
    print_table(settings_table(_records(tmp_path), metrics=None), stream=stream)
    text = stream.getvalue()
    assert "\x1b" not in text and not any(0x2500 <= ord(sign) <= 0x257F for sign in text)
    first, second = (line for line in text.splitlines() if line.startswith("lora-"))
    assert first.split() == [
        "lora-r8", "3", "2.71", "±", "0.20", "0.5271", "±", "0.0020", "4,194,304", "1.23", "GB", "1", "min", "15", "s",
    ]  # fmt: skip
    assert "2.70, 2.75" in second and "2 of 3" in second
    assert "heldout/loss ↓" in text and "skills_unseen/acc ↑" in text and "chance: skills_unseen/acc 0.250" in text
    assert "not in a mean: lora-r16-s2: DIVERGED: loss is NaN" in text


@pytest.mark.parametrize("width", [200, 100, 70, 40, 30, 10])
def test_no_width_of_a_terminal_cuts_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    print_table(settings_table(_records(tmp_path), metrics=None), stream=stream)
    text = stream.getvalue()
    shown = ["2.71 ± 0.20", "0.5271 ± 0.0020", "2.70, 2.75", "4,194,304", "1.23 GB", "1 min 15 s"]
    assert all(piece in text for piece in shown) and "…" not in text
    table = text[: text.index("mean ± 95 %")]
    tables = {200: 1, 100: 1, 70: 2, 40: 4, 30: 0, 10: 0}[width]
    assert table.count("setting") == tables, "split into tables that fit, and into lists below that"
    if tables:
        plain = [clean(line) for line in table.splitlines()]
        assert max(map(len, plain)) <= width


def test_optional_columns_give_way_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    stream = Terminal()
    print_plan([_plan_row("lora-r8-all_linear-s0")], stream=stream)
    text = stream.getvalue()
    assert "460,800" in text and "134,975,808" not in text
    assert "left out in this width: fingerprint, cohort, total" in text


def test_a_terminal_has_colour_unless_it_is_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid((Column("a"), Column("b", is_number=True)), (("x", "1"),))
    coloured = Terminal()
    print_grid(console_for(coloured), grid)
    assert "\x1b[1m" in coloured.getvalue()
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe = io.StringIO()
    print_grid(console_for(pipe), grid)
    assert "\x1b" not in pipe.getvalue(), "a pipe stays plain even where colour is forced by the environment"


def test_a_pipe_is_not_cut_to_eighty() -> None:
    stream = io.StringIO()
    grid = Grid(tuple(Column(f"column {index}") for index in range(40)), (tuple("x" * 30 for _ in range(40)),))
    print_grid(console_for(stream), grid)
    header, row = stream.getvalue().splitlines()
    assert row.split() == ["x" * 30] * 40 and header.count("column") == 40


def test_an_ascii_pipe_gets_ascii(tmp_path: Path) -> None:
    stream = Latin()
    print_table(settings_table(_records(tmp_path), metrics=None), stream=stream)
    assert stream.getvalue().isascii() and "2.71 +/- 0.20" in stream.getvalue()
    assert encodable("± ↓ 漢", "ascii") == "+/- v ?" and encodable("± ↓ 漢", "utf-8") == "± ↓ 漢"


HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07x",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
    "a\rb",
    "a\x08\x08b",
    "\x9b2Jx",
    "right\u202eleft",
    "nul\x00",
    "two\nlines",
]


@pytest.mark.parametrize("name", [*HOSTILE, "[bold]x[/bold]", "[/]", ":smile:", "[link=http://x]y[/link]"])
def test_hostile_names_reach_the_terminal_as_text(tmp_path: Path, name: str) -> None:
    record = ended(tmp_path, trial_of(), name=name, status=Status.FAILED, reason=name)
    stream = io.StringIO()
    print_runs([record], stream=stream)
    print_table(settings_table([record], metrics=None), stream=stream)
    print_comparison(compare_runs(record, record), stream=stream)
    text = stream.getvalue()
    assert not any((ord(sign) < 32 and sign != "\n") or sign in "\x7f\x9b\u202e" for sign in text)
    assert clean(name) in text
    if name not in HOSTILE:
        assert name in text, "markup is shown, not obeyed"


def test_clean_keeps_words() -> None:
    assert clean("\x1b[1;31mred\x1b[0m é 漢\tx") == "red é 漢 x"


def test_runs_show_state_reason_and_damage(tmp_path: Path) -> None:
    records = _records(tmp_path)
    (records[0].folder / "result.json").write_text("{")
    stream = io.StringIO()
    print_runs([read_record(record.folder) for record in records], stream=stream)
    text = stream.getvalue()
    assert "DAMAGED" in text and "result.json:1: damaged JSON" in text and "loss is NaN" in text
    assert "6 runs" in text
    stream = io.StringIO()
    print_runs(records, as_json=True, stream=stream)
    assert json.loads(stream.getvalue())[1]["peak_allocated_bytes"] == 1_234_567_890


def _plan_row(name: str, **changes: object) -> PlanRow:
    fields: dict = {
        "name": name,
        "fingerprint": "ab" * 32,
        "setting": "cd" * 32,
        "repeat": 0,
        "state": "new",
        "steps": 20,
        "train_rows": 160,
        "trainable_parameters": 460_800,
        "adapter_parameters": 460_800,
        "router_parameters": 0,
        "total_parameters": 134_975_808,
        "overrides": ("rank=8",),
        "missing": {},
        "cohort": None,
        "cohort_size": 1,
        "why_alone": "launch.cohort=off",
    }
    return PlanRow(**{**fields, **changes})


def test_plan_in_text_and_json() -> None:
    rows = [
        _plan_row("lora-r8"),
        _plan_row("lora-r8", state="duplicate"),
        _plan_row("x", steps=None, state="done", missing={"steps": "epochs of an unknown number of rows"}),
    ]
    stream = io.StringIO()
    print_plan(rows, stream=stream)
    text = stream.getvalue()
    assert "460,800" in text and "134,975,808" in text and "3 trials: 1 new, 1 done, 1 duplicate" in text
    assert "not known: steps: epochs of an unknown number of rows" in text
    stream = io.StringIO()
    print_plan(rows, as_json=True, stream=stream)
    first, _, last = json.loads(stream.getvalue())
    assert first["trainable_parameters"] == 460_800 and first["overrides"] == ["rank=8"]
    assert last["steps"] is None


def test_a_plan_tells_who_trains_with_whom_and_why_the_others_do_not() -> None:
    together = {"cohort": "c-0123abcd", "cohort_size": 2, "why_alone": None}
    ended_already = {"state": "done", "cohort": None, "cohort_size": None, "why_alone": None}
    rows = [
        _plan_row("lora-s0", **together),
        _plan_row("lora-s1", **together),
        *(_plan_row(f"full-s{seed}", why_alone="method=full trains weights") for seed in range(5)),
        _plan_row("base", why_alone="method=base trains nothing"),
        _plan_row("lora-s2", **ended_already),
    ]
    stream = io.StringIO()
    print_plan(rows, stream=stream)
    lines = stream.getvalue().splitlines()
    shown = {line.split()[0]: line.split()[3:-3] for line in lines[1:10]}
    assert shown == {
        "lora-s0": ["c-0123abcd", "of", "2"],
        "lora-s1": ["c-0123abcd", "of", "2"],
        **{f"full-s{seed}": ["alone"] for seed in range(5)},
        "base": ["alone"],
        "lora-s2": [],
    }
    assert lines[10:] == [
        "9 trials: 8 new, 1 done, 0 duplicate",
        "c-0123abcd: 2 trials train together",
        "alone: full-s0, full-s1, full-s2 and 2 more: method=full trains weights",
        "alone: base: method=base trains nothing",
    ]
    stream = io.StringIO()
    print_plan(rows, as_json=True, stream=stream)
    told = [(row["cohort"], row["cohort_size"], row["why_alone"]) for row in json.loads(stream.getvalue())]
    assert told[0] == ("c-0123abcd", 2, None) and told[2] == (None, 1, "method=full trains weights")
    assert told[-1] == (None, None, None)


def test_comparison_shows_settings_scores_and_pairs(tmp_path: Path) -> None:
    a = ended(tmp_path, trial_of(rank=4), metrics={"heldout/loss": loss(2.5)}, missing={})
    b = ended(tmp_path, trial_of(rank=8), metrics={"heldout/loss": loss(2.25)})
    for record, scores in ((a, [1, 0, 0, 1]), (b, [1, 1, 1, 1])):
        record.eval_folder.mkdir()
        lines = [
            json.dumps({"doc_id": i, "doc_hash": str(i), "filter": "none", "metrics": ["acc"], "acc": score})
            for i, score in enumerate(scores)
        ]
        (record.eval_folder / "samples_t_2026-01-01T00-00-00.0.jsonl").write_text("\n".join(lines) + "\n")
    stream = io.StringIO()
    print_comparison(compare_runs(a, b), stream=stream)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["rank", "4", "8"] in lines
    assert ["heldout/loss", "2.50", "2.25", "-0.250", "b"] in lines
    assert ["t/acc", "4", "0.5", "±", "0.9", "0", ":", "2", "0.500"] in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (512, "512 B"),
        (12_300, "12.3 kB"),
        (4.56e8, "456 MB"),
        (1.5e9, "1.50 GB"),
        (2e12, "2000 GB"),
    ],
)
def test_bytes(value: float | None, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.523, "0.523 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds_text(value) == text


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (2.71234, 0.0812, "2.71 ± 0.08"),
        (2.71234, 0.0141, "2.712 ± 0.014"),
        (0.5, 0.25, "0.5 ± 0.2"),
        (1234.5, 56.0, "1234 ± 56"),
        (2.5, 0.0, "2.500 ± 0"),
        (2.71234, 0.00000123, "2.7123400 ± 0.0000012"),
    ],
)
def test_intervals(mean: float, half: float, text: str) -> None:
    assert interval_text(mean, half) == text


def test_points_are_told_apart() -> None:
    assert points_text([2.7, 2.75]) == "2.70, 2.75"
    assert points_text([2.7001, 2.7002]) == "2.7001, 2.7002"
    assert points_text([0.5]) == "0.500" and points_text([]) == ""
    assert number_text(123456.0) == "123456" and number_text(1e-7) == "1e-07" and number_text(0.0) == "0.00"
