"""Progress of a sweep: few plain lines in a pipe, a live table in a terminal of any size, no invented time."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunHeader
from lora_lab.record.watcher import Watcher
from lora_lab.report.grid import console_for
from lora_lab.report.live import draw
from lora_lab.report.progress import Progress
from lora_lab.report.sweep import RunView, Sweep, SweepView
from tests.unit.ledger_samples import digest
from tests.unit.test_report_terminal import Terminal

FOLDER = Path("runs")


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "120"), ("LINES", "30")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lora_lab.report.live._FRAMES_PER_SECOND", 1e-3)  # tests say when a frame is drawn


def _header(name: str) -> RunHeader:
    return RunHeader(
        schema_version=1,
        run_id=digest(name)[:16],
        name=name,
        fingerprint=digest(name),
        setting=digest(name),
        repeat=0,
        attempt=1,
        numerics_version=1,
        tag=None,
        claimed_at="2026-01-01T00:00:00.000+00:00",
        machine_id=None,
        identities={},
        trial={},
    )


def _result(header: RunHeader, status: Status = Status.COMPLETED, reason: str | None = None) -> Result:
    return Result(
        schema_version=1,
        numerics_version=1,
        run_id=header.run_id,
        fingerprint=header.fingerprint,
        setting=header.setting,
        repeat=0,
        attempt=1,
        status=status,
        reason=reason,
        started_at="",
        finished_at="",
        trainable_parameters=None,
        total_parameters=None,
        predicted_peak_allocated_bytes=None,
        metrics={},
        measurements={},
        facts={},
        missing={},
    )


def _step(watcher: Watcher, name: str, step: int, **changes: float) -> None:
    values = {"step": step, "loss": 2.5, "tokens": 1000, "seconds": 1.0, "rss_bytes": 10**9, **changes}
    watcher.step(_header(name).run_id, step, values)


def _start(watcher: Watcher, name: str, steps: int = 100) -> None:
    watcher.run_started(_header(name), FOLDER, steps=steps)
    watcher.phase(_header(name).run_id, "training")


def _end(watcher: Watcher, name: str, status: Status = Status.COMPLETED, reason: str | None = None) -> None:
    watcher.run_finished(_header(name), FOLDER, _result(_header(name), status, reason))


def _run(
    watcher: Watcher,
    clock: Clock,
    *,
    seconds: float,
    name: str = "run",
    steps: int = 100,
    status: Status = Status.COMPLETED,
) -> None:
    _start(watcher, name, steps)
    for step in range(1, steps + 1):
        clock.now += seconds / steps
        _step(watcher, name, step)
    _end(watcher, name, status)


def test_a_pipe_gets_few_lines_with_run_step_loss_and_memory(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, clock) as progress:
        progress.begin(2)
        _run(progress, clock, seconds=100.0)
        progress.run_started(_header("other"), FOLDER, steps=0)
        _end(progress, "other", Status.FAILED, "boom\nand more")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "2 runs to do"
    assert lines[1] == "[1/2] run started, 100 steps; time left: unknown"
    assert lines[2] == "  run: step 10/100, loss 2.50, 1,000 tokens/s, 1.00 GB; time left: unknown"
    assert len(lines) == 2 + 10 + 1 + 2, "a line per tenth of the steps"
    assert lines[12] == "[1/2] run COMPLETED in 1 min 40 s"
    assert "[2/2] other started; time left: about 1 min 40 s" in lines
    assert lines[-1].startswith("[2/2] other FAILED") and lines[-1].endswith(": boom")
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "steps", "lines"), [(5.0, 1000, 0), (100.0, 1000, 10), (3600.0, 10_000, 60)])
def test_lines_are_rare_but_silence_is_short(clock: Clock, seconds: float, steps: int, lines: int) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress.begin(1)
    _run(progress, clock, seconds=seconds, steps=steps)
    told = sum(line.startswith("  run: step") for line in stream.getvalue().splitlines())
    assert abs(told - lines) <= 1


def test_runs_open_together_take_turns_and_are_named(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress.begin(3)
    names = ("a", "b", "c")
    for name in names:
        _start(progress, name, steps=1000)
    for step in range(1, 1001):
        clock.now += 0.07
        for name in names:
            _step(progress, name, step, loss=float(ord(name)))
    lines = [line.split() for line in stream.getvalue().splitlines() if " step " in line]
    assert [line[0] for line in lines[:6]] == ["a:", "b:", "c:", "a:", "b:", "c:"]
    assert len(lines) <= 7, "as rare as for one run: a line in ten seconds"
    assert {(line[0], line[4]) for line in lines} == {("a:", "97.0,"), ("b:", "98.0,"), ("c:", "99.0,")}


def test_time_left_is_unknown_until_a_run_has_completed(clock: Clock) -> None:
    progress = Progress(io.StringIO(), clock)
    progress.begin(4)
    assert progress.seconds_left() is None
    _run(progress, clock, seconds=1.0, status=Status.FAILED)
    assert progress.seconds_left() is None, "a run that failed early says nothing about the others"
    _run(progress, clock, seconds=60.0, name="other")
    assert progress.seconds_left() == pytest.approx(2 * 60.0)


def test_time_left_takes_the_median_and_the_present_steps(clock: Clock) -> None:
    progress = Progress(io.StringIO(), clock)
    progress.begin(6)
    for index, seconds in enumerate((10.0, 20.0, 90.0)):
        _run(progress, clock, seconds=seconds, name=f"run{index}")
    assert progress.seconds_left() == pytest.approx(3 * 20.0)
    _start(progress, "slow")
    clock.now += 5.0
    assert progress.seconds_left() == pytest.approx(2 * 20.0 + 15.0)
    _step(progress, "slow", 5)
    assert progress.seconds_left() == pytest.approx(2 * 20.0 + 95.0), "its own steps say it takes longer"


def test_time_left_of_runs_that_are_open_together(clock: Clock) -> None:
    progress = Progress(io.StringIO(), clock)
    progress.begin(12)
    for names in ("abc", "def"):
        for name in names:
            _start(progress, name)
        clock.now += 90.0
        for name in names:
            _end(progress, name)
    assert progress.seconds_left() == pytest.approx(180.0), "two more groups of three"
    for name in "ghi":
        _start(progress, name)
    clock.now += 60.0
    assert progress.seconds_left() == pytest.approx(90.0 + 30.0)
    for name in "ghi":
        _step(progress, name, 50)
    assert progress.seconds_left() == pytest.approx(90.0 + 60.0), "their steps go on side by side"


def test_a_run_tried_again_counts_once(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress.begin(2)
    _run(progress, clock, seconds=1.0, status=Status.FAILED)
    _run(progress, clock, seconds=60.0)
    assert progress.seconds_left() == pytest.approx(60.0)
    _run(progress, clock, seconds=60.0, name="other")
    assert progress.seconds_left() == 0.0
    ends = [line[:5] for line in stream.getvalue().splitlines() if "COMPLETED" in line or "FAILED" in line]
    assert ends == ["[1/2]", "[1/2]", "[2/2]"]


def test_a_terminal_gets_a_live_table_and_the_cursor_back(clock: Clock) -> None:
    stream = Terminal()
    with Progress(stream, clock) as progress:
        progress.begin(5)
        _run(progress, clock, seconds=20.0, name="done")
        _run(progress, clock, seconds=1.0, name="lost", status=Status.OUT_OF_MEMORY)
        for name in ("lora-[bold]r8\x1b[35m", "dora"):
            _start(progress, name, 20)
        _step(progress, "lora-[bold]r8\x1b[35m", 7, loss=2.345, tokens=800, rss_bytes=2 * 10**9)
        clock.now += 5.0
        progress._live.refresh()  # type: ignore[union-attr]
    text = _plain(stream.getvalue())
    assert "5 runs: 1 completed, 1 out of memory, 2 running, 1 waiting, 26 s elapsed, about 55 s left" in text
    assert re.search(r"^lora-\[bold\]r8 +training +━*\S* +7/20 +2\.35 +800 +2\.00 GB +5 s *$", text, re.MULTILINE)
    assert re.search(r"^dora +training +\S+ +0/20 +- +- +- +5 s *$", text, re.MULTILINE)
    assert re.search(r"^done +COMPLETED +\S+ +100/100 +2\.50 +1,000 +1\.00 GB +20\.0 s *$", text, re.MULTILINE)
    assert re.search(r"^run +state +steps +loss +tokens/s +RSS +time *$", text, re.MULTILINE)
    assert "\x1b[35m" not in stream.getvalue()
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0


def test_no_time_left_is_shown_before_it_is_known(clock: Clock) -> None:
    sweep = Sweep(clock)
    sweep.begin(3)
    sweep.start(_header("run"), 100)
    assert _drawn(sweep.view(), 120, 30)[0] == "3 runs: 1 running, 2 waiting, 0 s elapsed"


def test_a_failure_stays_with_the_first_line_of_its_reason(clock: Clock) -> None:
    sweep = Sweep(clock)
    sweep.begin(20)
    for index in range(10):
        header = _header(f"r{index}")
        sweep.start(header, 10)
        failed = _result(header, Status.FAILED, "RuntimeError: [red]no\nTraceback")
        sweep.finish(header, failed if index == 0 else _result(header))
    lines = _drawn(sweep.view(), 80, 24)
    assert lines[-2] == "r0 FAILED: RuntimeError: [red]no", "long after its row has gone"
    assert sum("COMPLETED" in line for line in lines) == 5
    sweep.start(_header("r0"), 10)
    assert not any("RuntimeError" in line for line in _drawn(sweep.view(), 80, 24)), "it is tried again"


NAMES = ("base", "lora-nf4dq-r16-all_linear_head-s0", "rslora-r64-attention-s3", "lora-r8-qv-s0")


@pytest.mark.parametrize("running", [0, 1, 3, 40])
@pytest.mark.parametrize(("width", "height"), [(40, 10), (41, 11), (60, 12), (80, 24), (120, 30), (300, 60)])
def test_it_fits_and_no_number_is_cut(width: int, height: int, running: int) -> None:
    lines = _drawn(_busy(running), width, height)
    assert len(lines) <= height - 1 and lines[-1] == ""
    assert max(map(len, lines)) <= width
    (head,) = (line for line in lines if line.startswith("run "))
    rows = [line for line in lines if re.search(r" (training|COMPLETED|OUT_OF_MEMORY) ", line) and ":" not in line]
    numbers = {
        "steps": "12345/99999",
        "loss": "0.0123",
        "tokens/s": "123,456",
        "RSS": "999 MB",
        "time": "(59 min 59|12.3) s",
    }
    shown = [title for title in numbers if title in head.split()]
    assert shown[0] == "steps" and (width < 120 or shown == list(numbers))
    for row in rows:
        assert re.search(" +".join(numbers[title] for title in shown) + "$", row)
    assert len(rows) >= min(running, 2)
    told = sum(" training " in row for row in rows)
    more = re.search(r"and (\d+) more running", "\n".join(lines))
    assert told + (int(more[1]) if more else 0) == running


def test_a_plain_encoding_gets_plain_signs() -> None:
    lines = _drawn(_busy(2), 60, 30, encoding="ascii")
    assert "\n".join(lines).isascii() and max(map(len, lines)) <= 60


def test_scoring_says_how_far_it_is(clock: Clock) -> None:
    """In the column of steps, which are all done; and the phase goes on, it does not begin again with every share."""
    sweep = Sweep(clock)
    sweep.start(_header("run"), 100)
    for share in (0.0, 0.25):
        clock.now += 5
        sweep.phase(_header("run").run_id, f"scoring: {share:.0%}")
    (run,) = sweep.view().running
    row = next(line for line in _drawn(replace(_busy(0), running=(run,)), 120, 30) if "scoring" in line)
    assert "25%" in row and "scoring:" not in row


def _busy(running: int) -> SweepView:
    def run(name: str, state: str, *, is_open: bool, seconds: float) -> RunView:
        reason = None if state != Status.OUT_OF_MEMORY else "OutOfMemoryError: " + "no room " * 40
        return RunView(name, state, is_open, 12345, 99999, 0.0123, 123456.0, "rss_bytes", 999e6, seconds, reason)

    ended = tuple(run(name, Status.COMPLETED, is_open=False, seconds=12.3) for name in NAMES)
    ended += (run(NAMES[1], Status.OUT_OF_MEMORY, is_open=False, seconds=12.3),)
    return SweepView(
        total=1000,
        waiting=955,
        running=tuple(run(NAMES[index % 4], "training", is_open=True, seconds=3599) for index in range(running)),
        ended=ended,
        failures=ended[-1:],
        outcomes={Status.COMPLETED: 40, Status.OUT_OF_MEMORY: 4, Status.DIVERGED: 1},
        elapsed_seconds=86_399.0,
        seconds_left=186_399.0,
    )


def _drawn(view: SweepView, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    """The lines of one frame, without colours, as a terminal that is wide enough shows them."""
    console = console_for(stream := Terminal())
    console.width = width
    console.print(draw(view, width=width, height=height, encoding=encoding))
    return [line.rstrip() for line in _plain(stream.getvalue()).split("\n")[:-1]]


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


class Screen:
    """What a terminal of endless height shows: text, line ends, cursor up, erased rows; narrower, it wraps its rows."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows: list[str] = [""]
        self.wrapped: set[int] = set()  # rows that go on in the next
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for sequence, sign in re.findall(r"\x1b\[([0-9;?]*[A-Za-z])|([\s\S])", text):
            if sequence.endswith("A"):
                self.row = max(self.row - int(sequence[:-1]), 0)
            elif sequence == "2K":
                self.rows[self.row] = ""
                self.wrapped.discard(self.row)
            elif sign in ("\r", "\n"):
                self.column = 0
                self._down(sign == "\n")
            elif sign:
                self._put(sign)

    def _put(self, sign: str) -> None:
        if self.column == self.width:
            self.wrapped.add(self.row)
            self.column = 0
            self._down(True)
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + sign + row[self.column + 1 :]
        self.column += 1

    def _down(self, is_down: bool) -> None:
        self.row += is_down
        while len(self.rows) <= self.row:
            self.rows.append("")

    def narrow(self, width: int) -> None:
        assert self.row == len(self.rows) - 1 and not self.wrapped, "else the cursor would have to be found again"
        rows, self.rows, self.width = self.rows, [], width
        for row in rows:
            pieces = [row[start : start + width] for start in range(0, max(len(row), 1), width)]
            self.wrapped |= {len(self.rows) + index for index in range(len(pieces) - 1)}
            self.rows += pieces
        self.row, self.column = len(self.rows) - 1, len(self.rows[-1])

    def text(self) -> str:
        """Logical lines."""
        ends = ["" if index in self.wrapped else "\n" for index in range(len(self.rows))]
        return "".join(row + end for row, end in zip(self.rows, ends, strict=True)).rstrip("\n")


def test_only_a_line_per_ended_run_is_left_also_in_a_window_made_narrower(
    clock: Clock,
) -> None:
    stream, screen = Terminal(), Screen(120)
    screen.feed("$ lora-lab run\n")
    with Progress(stream, clock) as progress:
        live = progress._live
        assert live is not None
        progress.begin(3)
        _run(progress, clock, seconds=12.5, name="first")
        _start(progress, "second")
        live.refresh()
        _flush(stream, screen)
        assert "second" in screen.text() and "3 runs: 1 completed, 1 running, 1 waiting" in screen.text()
        screen.narrow(50)
        live.console.width = 50
        live.refresh()
        _flush(stream, screen)
        assert screen.text().count("3 runs:") == 1 and screen.text().count("first") == 2
        screen.feed("^C")
        clock.now += 3.0
        _end(progress, "second", Status.INTERRUPTED, "interrupted (Ctrl-C)")
    _flush(stream, screen)
    ended = "[1/3] first COMPLETED in 12.5 s\n[2/3] second INTERRUPTED in 3.00 s: interrupted (Ctrl-C)"
    assert screen.text() == f"$ lora-lab run\n{ended}"


def _flush(stream: Terminal, screen: Screen) -> None:
    screen.feed(stream.getvalue())
    stream.seek(0)
    stream.truncate()


def test_the_display_ends_when_the_sweep_is_interrupted(clock: Clock) -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(stream, clock) as progress:
        progress.begin(1)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in stream.getvalue()


def test_no_color_is_respected(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|38)\b[0-9;]*m")
    for value, is_coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        stream = Terminal()
        with Progress(stream, clock) as progress:
            progress.begin(1)
            _start(progress, "run")
            progress._live.refresh()  # type: ignore[union-attr]
        assert bool(colours.search(stream.getvalue())) is is_coloured


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_sweep_goes_on_when_nobody_reads(clock: Clock, kind: type[io.StringIO]) -> None:
    class Gone(kind):  # type: ignore[misc, valid-type]
        told = 0

        def write(self, text: str) -> int:
            Gone.told += 1
            raise OSError(5, "Input/output error")

    with Progress(Gone(), clock) as progress:
        progress.begin(1)
        if progress._live is not None:
            progress._live.refresh()
        _run(progress, clock, seconds=100.0)
    assert Gone.told > 0 and progress.seconds_left() == 0.0


def test_a_reader_that_leaves_a_pipe_does_not_stop_the_sweep(clock: Clock) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as stream, Progress(stream, clock) as progress:  # noqa: PTH123
        progress.begin(1)
        _run(progress, clock, seconds=100.0)
    assert progress.seconds_left() == 0.0


def test_stdout_stays_free(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = Progress(clock=clock)
    progress.begin(1)
    _run(progress, clock, seconds=30.0)
    captured = capsys.readouterr()
    assert captured.out == "" and "run COMPLETED" in captured.err


def test_a_terminal_without_cursor_movement_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(stream, clock) as progress:
        progress.begin(1)
        _run(progress, clock, seconds=100.0)
    assert "\x1b" not in stream.getvalue() and "step 20/100" in stream.getvalue()


def test_nothing_to_run_is_said(clock: Clock) -> None:
    stream = io.StringIO()
    Progress(stream, clock).begin(0)
    assert stream.getvalue() == "nothing to run\n"
