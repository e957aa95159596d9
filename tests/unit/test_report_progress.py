"""Progress of a sweep: few plain lines in a pipe, a live display in a terminal, no invented time."""

from __future__ import annotations

import io

import pytest

from lora_lab.record.result import Status
from lora_lab.report.progress import Progress
from tests.unit.test_report_terminal import Terminal


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _run(
    progress: Progress, clock: Clock, *, seconds: float, index: int = 0, steps: int = 100, status: str = "COMPLETED"
) -> None:
    progress.run_started(index, "run", steps)
    progress.phase("training")
    for step in range(1, steps + 1):
        clock.now += seconds / steps
        progress.step(step, 2.5, 1000.0, 10**9)
    progress.run_finished("run", status, None)


def test_a_pipe_gets_few_lines_with_run_step_loss_and_memory(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, clock) as progress:
        progress.begin(2)
        _run(progress, clock, seconds=100.0)
        progress.run_started(1, "other", 0)
        progress.run_finished("other", Status.FAILED, "boom")
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


def test_time_left_is_unknown_until_a_run_has_completed(clock: Clock) -> None:
    progress = Progress(io.StringIO(), clock)
    progress.begin(4)
    assert progress.seconds_left() is None
    _run(progress, clock, seconds=1.0, status="FAILED")
    assert progress.seconds_left() is None, "a run that failed early says nothing about the others"
    _run(progress, clock, seconds=60.0, index=1)
    assert progress.seconds_left() == pytest.approx(2 * 60.0)


def test_time_left_takes_the_median_and_the_present_steps(clock: Clock) -> None:
    progress = Progress(io.StringIO(), clock)
    progress.begin(6)
    for index, seconds in enumerate((10.0, 20.0, 90.0)):
        _run(progress, clock, seconds=seconds, index=index)
    assert progress.seconds_left() == pytest.approx(3 * 20.0)
    progress.run_started(3, "slow", 100)
    progress.phase("training")
    clock.now += 5.0
    assert progress.seconds_left() == pytest.approx(2 * 20.0 + 15.0)
    progress.step(5, 2.0, 1.0, None)
    assert progress.seconds_left() == pytest.approx(2 * 20.0 + 95.0), "its own steps say it takes longer"


def test_a_run_tried_again_counts_once(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress.begin(2)
    _run(progress, clock, seconds=1.0, status="FAILED")
    _run(progress, clock, seconds=60.0)
    assert progress.seconds_left() == pytest.approx(60.0)
    _run(progress, clock, seconds=60.0, index=1)
    assert progress.seconds_left() == 0.0
    ends = [line[:5] for line in stream.getvalue().splitlines() if "COMPLETED" in line or "FAILED" in line]
    assert ends == ["[1/2]", "[1/2]", "[2/2]"]


def test_a_terminal_gets_a_live_display_and_the_cursor_back(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(stream, clock) as progress:
        progress.begin(3)
        progress.run_started(0, "lora-[bold]r8", 20)
        progress.phase("training")
        progress.step(7, 2.345, 800.0, 2 * 10**9)
        progress._live.refresh()  # type: ignore[union-attr]
    text = stream.getvalue()
    assert "lora-[bold]r8, training, step 7/20, loss 2.35, 800 tokens/s, 2.00 GB" in text
    assert "3 of 3 runs left" in text and "time left: unknown" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_the_display_ends_when_the_sweep_is_interrupted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(stream, clock) as progress:
        progress.begin(1)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in stream.getvalue()


def test_stdout_stays_free(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = Progress(clock=clock)
    progress.begin(1)
    _run(progress, clock, seconds=30.0)
    captured = capsys.readouterr()
    assert captured.out == "" and "run COMPLETED" in captured.err


def test_nothing_to_run_is_said(clock: Clock) -> None:
    stream = io.StringIO()
    Progress(stream, clock).begin(0)
    assert stream.getvalue() == "nothing to run\n"
