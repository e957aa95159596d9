"""The course of a step is thinned without losing a peak, and what is alive at the peak is told whole."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.plan.timeline import PARTS, START, Event, Place, Timeline
from lora_lab.study.memory_course import Alive, alive_at_peak, course_of
from tests.unit.timeline_samples import ACTIVATION, ADAPTER, BUFFER, STATE, WEIGHT, peak_of, step_of


@pytest.mark.parametrize("most", [3, 4, 7, 50, 10_000])
def test_the_peak_is_kept_however_few_the_points(most: int) -> None:
    timeline = step_of(6, steps_in_layer=9)
    course = course_of(timeline, most_points=most)
    assert len(course.points) <= most
    assert dict(zip(PARTS, course.peak.parts, strict=True)) == peak_of(6) == dict(timeline.peak.parts)
    assert course.peak.place == timeline.peak.place == Place("backward", 5)
    assert course.peak.total == timeline.peak.total and course.peak in course.points
    positions = [point.position for point in course.points]
    assert positions == sorted(set(positions)) and positions[0] == 0 and positions[-1] == course.events
    assert course.events == len(timeline.events) - 3, "all but what was there at the start"


def test_with_room_for_all_every_moment_is_there() -> None:
    timeline = step_of(2)
    course = course_of(timeline, most_points=1000)
    moments = list(timeline.moments())[2:]  # the third event completes the start
    assert [dict(zip(PARTS, point.parts, strict=True)) for point in course.points] == [dict(m.parts) for m in moments]
    assert course.width == 1


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Storages that come and go as they like, the first of them at the start."""
    events: list[Event] = []
    live: dict[int, int] = {}
    count = 0
    for number in range(draw(st.integers(1, 60))):
        place = START if number < 3 else Place(draw(st.sampled_from(["forward", "backward"])), draw(st.integers(0, 2)))
        if live and place != START and draw(st.booleans()):
            storage = draw(st.sampled_from(sorted(live)))
            events.append(Event(storage, -live.pop(storage), place))
        else:
            live[count] = draw(st.integers(1, 9))
            events.append(Event(count, live[count], place))
            count += 1
    return Timeline(tuple(events), {number: draw(st.sampled_from(PARTS)) for number in range(0, count, 2)})


@given(timelines(), st.integers(3, 30))
def test_thinning_keeps_the_largest_moment_of_every_bin(timeline: Timeline, most: int) -> None:
    course = course_of(timeline, most_points=most)
    assert len(course.points) <= most
    assert course.peak.total == timeline.peak.total
    start = len(timeline.events) - course.events
    totals = [moment.total for moment in timeline.moments()][start - 1 :]
    assert all(point.total == totals[point.position] for point in course.points)
    for first in range(1, course.events + 1, course.width):
        inside = range(first, min(first + course.width, course.events + 1))
        largest = max(totals[position] for position in inside)
        assert any(point.position in inside and point.total == largest for point in course.points)


@given(timelines())
def test_what_is_alive_adds_up_to_the_peak(timeline: Timeline) -> None:
    alive = alive_at_peak(timeline)
    course = course_of(timeline, most_points=1000)
    by_part: Counter[str] = Counter()
    for one in alive:
        by_part[one.part] += one.total_bytes
    assert {part: by_part[part] for part in PARTS} == dict(zip(PARTS, course.peak.parts, strict=True))
    assert [one.total_bytes for one in alive] == sorted((one.total_bytes for one in alive), reverse=True)


def test_layers_with_the_same_tensors_are_told_as_one() -> None:
    assert alive_at_peak(step_of(6)) == [
        Alive(START, None, "weights", 1, WEIGHT, WEIGHT),
        Alive(Place("forward", 0), 5, "activations", 6, 6 * ACTIVATION, ACTIVATION),
        Alive(START, None, "optimizer_state", 1, STATE, STATE),
        Alive(Place("backward", 5), 5, "temporary", 1, BUFFER, BUFFER),
        Alive(START, None, "adapter", 1, ADAPTER, ADAPTER),
        Alive(Place("forward", after=True), None, "activations", 1, 7, 7),
    ]
    told = [one.where for one in alive_at_peak(step_of(6))]
    assert told == ["start", "forward, layers 0 to 5", "start", "backward, layer 5", "start", "forward, head and loss"]


def test_a_layer_of_another_size_stands_by_itself() -> None:
    sizes = [10, 10, 11, 10]
    events = tuple(Event(number, size, Place("forward", number)) for number, size in enumerate(sizes))
    timeline = Timeline(events, dict.fromkeys(range(4), "activations"))
    assert [(one.where, one.total_bytes) for one in alive_at_peak(timeline)] == [
        ("forward, layers 0 to 1", 20),
        ("forward, layer 2", 11),
        ("forward, layer 3", 10),
    ]


def test_phases_and_layers_lie_where_their_events_do() -> None:
    timeline = step_of(3)
    course = course_of(timeline, most_points=1000)
    phases = [event.place.phase for event in timeline.events[3:]]
    assert [phase.name for phase in course.phases] == ["forward", "backward", "clip", "update"]
    for phase in course.phases:
        inside = {index for index, name in enumerate(phases, start=1) if name == phase.name}
        assert inside == set(range(phase.first, phase.last + 1))
    backward = [span for span in course.spans if span.place.phase == "backward" and span.place.layer is not None]
    assert [span.place.layer for span in backward] == [2, 1, 0]
    assert [span.last - span.first + 1 for span in backward] == [4, 4, 4]


def test_a_phase_that_comes_twice_is_two_phases() -> None:
    places = [Place("forward", 0), Place("backward", 0), Place("forward", 0), Place("backward", 0)]
    course = course_of(Timeline(tuple(Event(n, 1, place) for n, place in enumerate(places))), most_points=10)
    assert [phase.name for phase in course.phases] == ["forward", "backward", "forward", "backward"]
    assert [(span.turn, span.first, span.last) for span in course.spans] == [(n, n, n) for n in (1, 2, 3, 4)]


def test_a_timeline_without_events_is_none() -> None:
    with pytest.raises(ValueError, match="without events"):
        course_of(Timeline(()), most_points=10)


def test_a_step_that_only_begins() -> None:
    course = course_of(Timeline((Event(0, 5, START),)), most_points=10)
    assert course.peak.total == 5 and course.events == 0 and len(course.points) == 1
