"""A timeline of memory made fit to draw: few points that keep the peaks, where its phases and layers lie, what is alive
at the peak.

A position is an event's number after those with which the step begins; 0 is the beginning itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lora_lab.plan.timeline import PARTS, START, Place, Timeline


class Point(NamedTuple):
    """Live bytes after the event at `position`, by part in the order of `PARTS`."""

    position: int
    place: Place
    parts: tuple[int, ...]

    @property
    def total(self) -> int:
        """All live bytes."""
        return sum(self.parts)


class Span(NamedTuple):
    """From the first to the last event at a place. `turn`: of its phase, which may come more than once in a step."""

    place: Place
    turn: int
    first: int
    last: int


class Phase(NamedTuple):
    """Events of one phase without a break."""

    name: str
    first: int
    last: int


class Alive(NamedTuple):
    """Storages that are alive at the peak, came alive at one place, or at the same in each of several layers in a row
    (`last_layer`), and are one part: how many, and bytes."""

    place: Place
    last_layer: int | None
    part: str
    storages: int
    total_bytes: int
    largest_bytes: int

    @property
    def where(self) -> str:
        """The place in words: `forward, layers 1 to 31`."""
        if self.last_layer is None or self.last_layer == self.place.layer:
            return str(self.place)
        return f"{self.place.phase}, layers {self.place.layer} to {self.last_layer}"


@dataclass(frozen=True, slots=True)
class Course:
    """points: ascending positions, the first and the last moment among them; of every `width` events between them there
    is one. spans: in the order of their first events. events: how many of them there are after the beginning."""

    points: tuple[Point, ...]
    spans: tuple[Span, ...]
    phases: tuple[Phase, ...]
    peak: Point
    events: int
    width: int


def course_of(timeline: Timeline, *, most_points: int) -> Course:
    """The course of a step in at most `most_points` (3 or more) points: of equally many events the largest moment.

    Raises:
        ValueError: for a timeline without events.
    """
    if not timeline.events:
        raise ValueError("a timeline without events")
    start = sum(event.place == START for event in timeline.events)
    count = len(timeline.events) - start
    width = -(-count // (most_points - 2)) or 1
    points = list(_largest(_points(timeline, start), width))
    spans, phases = _spans(timeline, start)
    peak = max(points, key=lambda point: point.total)  # the earliest of equal ones
    return Course(tuple(points), spans, phases, peak, count, width)


def _points(timeline: Timeline, start: int) -> Iterator[Point]:
    """The beginning, and the moment after every later event."""
    live = dict.fromkeys(PARTS, 0)
    for number, event in enumerate(timeline.events, start=1):
        live[timeline.parts.get(event.storage, "temporary")] += event.change
        if number >= start and number > 0:
            yield Point(max(number - start, 0), event.place, tuple(live.values()))


def _largest(points: Iterable[Point], width: int) -> Iterator[Point]:
    """The first point, the largest (of equals the earliest) of each `width` that follow it, and the last."""
    largest: Point | None = None
    given = last = None
    for point in points:
        if last is None:
            yield point
        elif largest is None or point.total > largest.total:
            largest = point
        last = point
        if largest is not None and point.position % width == 0:
            yield (given := largest)
            largest = None
    if largest is not None:
        yield (given := largest)
    if last is not None and given is not None and last.position != given.position:
        yield last


def _spans(timeline: Timeline, start: int) -> tuple[tuple[Span, ...], tuple[Phase, ...]]:
    """A place is one span per turn of its phase, also where events of other places lie between."""
    ends: dict[tuple[Place, int], list[int]] = {}
    starts: list[tuple[str, int]] = []
    last = 0
    for last, event in enumerate(timeline.events[start:], start=1):
        if not starts or starts[-1][0] != event.place.phase:
            starts.append((event.place.phase, last))
        ends.setdefault((event.place, len(starts)), [last, last])[1] = last
    spans = tuple(Span(place, turn, *both) for (place, turn), both in ends.items())
    limits = pairwise([*starts, ("", last + 1)])
    return spans, tuple(Phase(name, first, after - 1) for (name, first), (_, after) in limits)


def alive_at_peak(timeline: Timeline) -> list[Alive]:
    """What is alive at the largest moment, by place of birth and part, most bytes first. Layers that follow each other
    and have equally many storages of the same sizes are told as one."""
    groups: dict[tuple[Place, str], list[int]] = {}
    for storage, (place, size) in _alive(timeline).items():
        groups.setdefault((place, timeline.parts.get(storage, "temporary")), []).append(size)
    found: list[Alive] = []
    sizes_before: list[int] = []
    for (place, part), sizes in sorted(groups.items(), key=lambda item: _by_layer(*item[0])):
        sizes.sort()
        before = found[-1] if found else None
        if before is not None and sizes == sizes_before and _follows(place, part, before):
            both = before.storages + len(sizes), before.total_bytes + sum(sizes), max(sizes)
            found[-1] = Alive(before.place, place.layer, part, *both)
        else:
            found.append(Alive(place, place.layer, part, len(sizes), sum(sizes), max(sizes)))
        sizes_before = sizes
    return sorted(found, key=lambda one: -one.total_bytes)


def _by_layer(place: Place, part: str) -> tuple[str, str, bool, int]:
    return place.phase, part, place.after, -1 if place.layer is None else place.layer


def _follows(place: Place, part: str, before: Alive) -> bool:
    is_next = place.layer is not None and before.last_layer is not None and place.layer == before.last_layer + 1
    return is_next and (place.phase, part) == (before.place.phase, before.part)


def _alive(timeline: Timeline) -> dict[int, tuple[Place, int]]:
    """By storage: where it came alive, and bytes, at the earliest of the largest moments."""
    total = largest = 0
    at = 0
    for number, event in enumerate(timeline.events, start=1):
        total += event.change
        if total > largest:
            largest, at = total, number
    alive: dict[int, tuple[Place, int]] = {}
    for event in timeline.events[:at]:
        place, size = alive.get(event.storage, (event.place, 0))
        alive[event.storage] = place, size + event.change
        if size + event.change <= 0:
            del alive[event.storage]
    return alive
