"""A cohort as it is watched: one line for it in a pipe, its members in a terminal, and a time left that is theirs."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import pytest

from lora_lab.record.result import Status
from lora_lab.record.watcher import CohortMember, CohortView, Watcher, Watchers
from lora_lab.report.progress import Progress
from lora_lab.report.redraw import Redraw
from lora_lab.report.sweep import Sweep
from lora_lab.report.time_left import Done, Pace, Waiting, sweep_seconds_left, training_seconds_left
from tests.unit.test_report_progress import (
    Clock,
    _drawn,
    _end,
    _header,
    _result,
    _start,
    _step,
    _terminal,  # noqa: F401 - a terminal of known size
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def view_of(steps: Mapping[str, int], *, of: int = 100, seats: int = 4, waiting: int = 0) -> CohortView:
    """Members by name with their steps done, losses falling with them."""
    members = tuple(
        CohortMember(_header(name).run_id, name, step, of, 3.0 - step / 100 if step else None)
        for name, step in steps.items()
    )
    return CohortView(members, seats, waiting, 345.0, "rss_bytes", 3.2e9)


def member_step(watcher: Watcher, name: str, step: int) -> None:
    """As the runner tells it: no seconds and no memory of its own."""
    values = {"step": step, "loss": 3.0 - step / 100, "tokens": 100, "cohort_rss_bytes": 3.2e9}
    watcher.step(_header(name).run_id, step, values)


def train_together(
    watcher: Watcher, clock: Clock, names: str, *, steps: int, seconds: float, cohort: str = "5f0c"
) -> None:
    """All names from their first step to the last one, side by side."""
    for step in range(1, steps + 1):
        clock.now += seconds / steps
        for name in names:
            member_step(watcher, name, step)
        watcher.cohort(cohort, view_of(dict.fromkeys(names, step), of=steps))


def test_a_pipe_gets_a_line_for_the_cohort_and_none_for_its_members(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, clock) as progress:
        progress.begin(3)
        for name in "abc":
            _start(progress, name, steps=1000)
        train_together(progress, clock, "abc", steps=1000, seconds=100.0)
        for name in "abc":
            _end(progress, name)
    lines = stream.getvalue().splitlines()
    told = [line for line in lines if "tokens/s" in line]
    assert abs(len(told) - 10) <= 1, "as rare as for one run: a line in ten seconds"
    assert re.fullmatch(
        r"  cohort 5f0c: 3 of 4 seats, 10% of the steps, loss 1\.9\d, 345 tokens/s, 3\.20 GB RSS, "
        r"about 1 min (30|29) s of training left; time left: unknown",
        told[0],
    )
    assert not any(re.match("  [abc]:", line) for line in lines)
    assert lines[-1] == "[3/3] c COMPLETED after 1 min 40 s with others in cohort 5f0c", "no run's own time"


def test_members_at_different_places_are_told_as_a_range(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress.begin(4)
    for name in "ab":
        _start(progress, name)
    progress.cohort("5f0c", view_of({"a": 0, "b": 0}))
    clock.now += 20.0
    progress.cohort("5f0c", view_of({"a": 20, "b": 50}, waiting=2))
    (line,) = (line for line in stream.getvalue().splitlines() if "cohort" in line)
    assert "2 of 4 seats, 2 waiting, 20% to 50% of the steps, loss 2.50 to 2.80, 345 tokens/s, 3.20 GB RSS, " in line


def test_two_cohorts_and_a_run_alone_take_turns(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress.begin(5)
    for name in "abcde":
        _start(progress, name, steps=1000)
    for step in range(1, 1001):
        clock.now += 0.07
        for name in "abcd":
            member_step(progress, name, step)
        for cohort, names in (("c1", "ab"), ("c2", "cd")):
            progress.cohort(cohort, view_of(dict.fromkeys(names, step), of=1000))
        _step(progress, "e", step)
    told = [line.split()[:2] for line in stream.getvalue().splitlines() if "tokens/s" in line]
    assert len(told) <= 7, "as rare as for one run"
    assert {tuple(one) for one in told[:3]} == {("cohort", "c1:"), ("cohort", "c2:"), ("e:", "step")}


def test_a_terminal_shows_the_cohort_and_its_members(clock: Clock) -> None:
    """20 steps of 100 in 40 s together: 160 s of training are left; speed and memory are no member's."""
    sweep = Sweep(clock)
    sweep.begin(6)
    for name in "abcd":
        sweep.start(_header(name), 100)
        sweep.phase(_header(name).run_id, "training")
    for step in range(1, 21):
        clock.now += 2.0
        sweep.cohort("5f0c", view_of(dict.fromkeys("abcd", step)))
        sweep.step(_header("a").run_id, step, {"loss": 2.5, "tokens": 100, "seconds": 0.1, "rss_bytes": 9e9})
    lines = _drawn(sweep.view(), 120, 30)
    assert lines[0] == "6 runs: 4 running, 2 waiting, 40 s elapsed"
    assert lines[1] == "cohort 5f0c: 4 of 4 seats, 345 tokens/s, 3.20 GB RSS, about 2 min 40 s of training left"
    assert lines[2].split() == ["run", "state", "steps", "loss", "time"], "no column that no run fills"
    rows = [line.split() for line in lines[3:7]]
    assert [row[0] for row in rows] == list("abcd") and all(row[1] == "training" for row in rows)
    assert all(row[-4:] == ["20/100", "2.80", "40", "s"] for row in rows[1:])


def test_a_run_beside_a_cohort_keeps_its_columns(clock: Clock) -> None:
    sweep = Sweep(clock)
    sweep.begin(2)
    for name in "ab":
        sweep.start(_header(name), 100)
    sweep.cohort("5f0c", view_of({"a": 5}))
    for name in "ab":  # whoever tells a member's own speed is not believed
        sweep.step(_header(name).run_id, 5, {"loss": 2.5, "tokens": 100, "seconds": 0.1, "rss_bytes": 9e9})
    member, alone = sorted(sweep.view().running, key=lambda run: run.name)
    assert (member.tokens_per_second, member.memory_bytes, member.cohort) == (None, None, "5f0c")
    assert (alone.tokens_per_second, alone.memory_bytes, alone.cohort) == (1000.0, 9e9, None)
    lines = _drawn(sweep.view(), 120, 30)
    assert "tokens/s" in lines[2] and "RSS" in lines[2]


def test_a_member_that_leaves_is_shown_until_it_has_ended_and_the_cohort_while_it_has_runs(
    clock: Clock,
) -> None:
    sweep = Sweep(clock)
    sweep.begin(2)
    for name in "ab":
        sweep.start(_header(name), 100)
    sweep.cohort("5f0c", view_of({"a": 99, "b": 50}))
    sweep.phase(_header("a").run_id, "scoring: 20%")
    sweep.cohort("5f0c", view_of({"b": 51}))
    (state,) = sweep.view().cohorts
    assert [run.name for run in state.members] == ["b", "a"] and (state.seated, state.shares) == (1, (0.51, 0.51))
    for name in "ab":
        sweep.finish(_header(name), _result(_header(name)))
    assert sweep.view().cohorts == () and all(run.cohort == "5f0c" for run in sweep.view().ended)
    sweep.start(_header("a"), 100)
    assert sweep.view().running[0].cohort is None, "tried again it may be alone"


@pytest.mark.parametrize("cohorts", [1, 3, 8])
@pytest.mark.parametrize(("width", "height"), [(40, 10), (60, 12), (80, 24), (120, 30)])
def test_cohorts_fit_any_terminal(clock: Clock, width: int, height: int, cohorts: int) -> None:
    sweep = Sweep(clock)
    sweep.begin(100)
    for cohort in range(cohorts):
        names = [f"lora-nf4dq-r16-all_linear_head-s{cohort}{place}" for place in range(4)]
        for name in names:
            sweep.start(_header(name), 100)
        clock.now += 5.0
        sweep.cohort(f"c{cohort}", view_of(dict.fromkeys(names, 10), waiting=20))
    lines = _drawn(sweep.view(), width, height)
    assert len(lines) <= height - 1 and max(map(len, lines)) <= width and lines[-1] == ""
    told = sum(line.startswith("cohort ") for line in lines)
    more = re.search(r"and (\d+) more cohorts", "\n".join(lines))
    assert told + (int(more[1]) if more else 0) == cohorts
    members = sum(" 10/100 " in f"{line} " for line in lines)
    hidden = re.search(r"and (\d+) more running", "\n".join(lines))
    assert members + (int(hidden[1]) if hidden else 0) == 4 * cohorts and members >= 1


def test_time_left_adds_up_what_runs_cost_not_one_after_the_other(clock: Clock) -> None:
    """Four seats, twelve runs of 100 steps, four of them in 100 s: 25 s each. One wave is through, one half way."""
    progress = Progress(io.StringIO(), clock)
    progress.begin(12)
    for names in ("abcd", "efgh"):
        for name in names:
            _start(progress, name)
        steps = 100 if names == "abcd" else 50
        train_together(progress, clock, names, steps=steps, seconds=steps)
        if names == "abcd":
            assert progress.seconds_left() is None
            for name in names:
                _end(progress, name)
    view = progress._sweep.view()
    assert view.waiting == 4
    # 200 s in all for eight runs: what is left of the wave by its steps, and four more runs
    assert progress.seconds_left() == pytest.approx(50.0 + 100.0)


def test_a_long_run_among_short_ones_does_not_make_its_length_count_for_all(clock: Clock) -> None:
    """One second a tick. Left of the long run: 900 ticks by the clock; of what runs cost: 1/3 of that, and the others'
    40 ticks. The truth lies between."""
    sweep = Sweep(clock)
    sweep.begin(4)
    sweep.start(_header("first"), 10)
    clock.now += 9.0
    sweep.finish(_header("first"), _result(_header("first")))
    lengths = {"long": 1000, "b": 140, "c": 140}
    for name, steps in lengths.items():
        sweep.start(_header(name), steps)
        sweep.phase(_header(name).run_id, "training")
    for step in range(1, 101):
        clock.now += 1.0
        for name in lengths:
            sweep.step(_header(name).run_id, step, {"loss": 1.0})
    total = 900 / 3 + 40 / 3 + 40 / 3
    assert sweep.seconds_left() == pytest.approx((total + 900.0) / 2)
    assert total < 900.0 and sweep.seconds_left() < 900 + 40 + 40, "one after the other"


def test_what_a_checkpoint_held_was_not_done_now(clock: Clock) -> None:
    """Resumed at step 50 of 100: ten steps in 20 s, so 80 s for the rest, not 13."""
    sweep = Sweep(clock)
    sweep.begin(1)
    header = _header("a").model_copy(update={"attempt": 2})
    sweep.start(header, 100)
    sweep.phase(header.run_id, "training")
    for step in range(51, 61):
        clock.now += 2.0
        sweep.step(header.run_id, step, {"loss": 1.0})
        sweep.cohort("5f0c", view_of({"a": step}))
    (state,) = sweep.view().cohorts
    assert state.training_seconds_left == pytest.approx(80.0)


def test_a_run_that_ended_early_has_no_steps_left_while_it_is_scored(clock: Clock) -> None:
    progress = Progress(io.StringIO(), clock)
    progress.begin(2)
    _start(progress, "a", 10)
    clock.now += 10.0
    _end(progress, "a")
    _start(progress, "b", 1000)
    for step in range(1, 11):
        clock.now += 1.0
        _step(progress, "b", step)
    assert progress.seconds_left() == pytest.approx(990.0)
    progress.phase(_header("b").run_id, "scoring")
    assert progress.seconds_left() == 0.0


def test_the_training_of_a_cohort_is_estimated_before_any_run_has_ended() -> None:
    """Two members at 2 s of their own a step, of 10 steps done and 40 left; a third has just joined, two wait."""
    pace = Pace(charged=25.0, charged_in_phase=20.0, phase_seconds=50.0, done=10, left=40)
    fresh = Pace(charged=1.0, charged_in_phase=0.0, phase_seconds=0.0, done=0, left=50)
    members = [pace, pace, fresh]
    assert training_seconds_left([fresh], Waiting(2, None)) is None
    assert training_seconds_left(members, Waiting(0, None)) == pytest.approx(260.0)
    assert training_seconds_left(members, Waiting(2, None)) == pytest.approx(260.0 + 200.0)
    assert training_seconds_left(members, Waiting(2, 30)) == pytest.approx(260.0 + 60.0), "by their steps"


def test_waiting_runs_cost_by_their_steps_where_these_are_known() -> None:
    """200 s for 100 steps; of three waiting runs with 60 steps in all."""
    done = [Done(50.0, 25), Done(150.0, 75)]
    assert sweep_seconds_left([], [], Waiting(3, 60)) is None
    assert sweep_seconds_left(done, [], Waiting(3, None)) == 300.0
    assert sweep_seconds_left(done, [], Waiting(3, 60)) == 120.0
    assert sweep_seconds_left([*done, Done(80.0, 0)], [], Waiting(3, 60)) == 120.0, "a base has no steps"
    assert sweep_seconds_left([Done(80.0, 0)], [], Waiting(3, 60)) == 240.0


def test_steps_of_waiting_runs_are_used_only_if_cohorts_know_all_of_them(clock: Clock) -> None:
    sweep = Sweep(clock)
    sweep.begin(4)
    sweep.start(_header("a"), 100)
    clock.now += 100.0
    sweep.finish(_header("a"), _result(_header("a")))
    sweep.start(_header("b"), 100)
    for waiting, steps, left in ((2, 10, 100.0 + 10.0), (1, 10, 100.0 + 200.0), (2, None, 100.0 + 200.0)):
        member = CohortMember(_header("b").run_id, "b", 0, 100, None)
        sweep.cohort("c", CohortView((member,), 2, waiting, None, None, None, waiting_steps=steps))
        assert sweep.seconds_left() == pytest.approx(left)


def test_all_watchers_hear_of_a_cohort_and_what_is_not_measured_is_left_out(clock: Clock) -> None:
    stream = io.StringIO()
    drawn: list[str] = []
    redraw = Redraw(lambda: drawn.append("x"), clock)
    watcher = Watchers([Progress(stream, clock), redraw])
    watcher.begin(1)
    _start(watcher, "a")
    member = CohortMember(_header("a").run_id, "a", 0, 100, None)
    for _ in range(2):
        watcher.cohort("x\x1b[31m", CohortView((member,), 2, 0, None, None, None))
        clock.now += 61.0
    assert stream.getvalue().splitlines()[-1] == "  cohort x: 1 of 2 seats, 0% of the steps; time left: unknown"
    assert drawn == ["x"], "a cohort is no reason to draw the page again"
    _end(watcher, "a")
    watcher.cohort("c2", CohortView((), 2, 0, None, None, None))
    assert "c2" not in stream.getvalue(), "nobody is in it, and it is no error"


def test_a_member_that_fails_leaves_its_reason(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock)
    progress.begin(2)
    for name in "ab":
        _start(progress, name)
    progress.cohort("5f0c", view_of({"a": 1, "b": 1}))
    clock.now += 3.0
    _end(progress, "a", Status.DIVERGED, "step 2: loss nan")
    assert stream.getvalue().splitlines()[-1] == (
        "[1/2] a DIVERGED after 3.00 s with others in cohort 5f0c: step 2: loss nan"
    )
