"""The events of a step of a deep model from those of four layers: the third is put in as often as layers are missing.

An allocator's reserve depends on the order of all events, and does not grow evenly with depth; so the events themselves
are made, and the allocator is run over them. What a layer leaves to its neighbour, there and back, is matched by the
order in which it is freed. The sum of live bytes over the made events must have the peak that is extrapolated; where it
has not, the layers were not alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from lora_lab.plan.timeline import START, Event, Place

# Of four layers (0 to 3) the one that is repeated; before and behind it stand one that has been through the first, and
# the last.
_TEMPLATE, _BEFORE, _BEHIND = 2, 1, 3
_Name = tuple[int, int]


def deepened(shallow: Sequence[Event], four: Sequence[Event], depth: int) -> list[Event]:
    """Events of a model of `depth` >= 4 layers.

    shallow, four: the events of the same step with three and with four layers.

    Raises:
        ValueError: layers do not leave as much to each other as they find.
    """
    layers = _Layers(four)
    extra = depth - 4
    numbers: dict[_Name, int] = {}

    def event(name: _Name, change: int, place: Place) -> Event:
        return Event(numbers.setdefault(name, len(numbers)), change, place)

    # What is there before the step stays to its end; a name is all that it needs.
    made = [event((-1 - index, 0), size, START) for index, size in enumerate(_before(shallow, four, extra + 1))]
    for place, block in _blocks(four):
        if place.layer != _TEMPLATE:
            made += [event(*one, place) for one in layers.outside(block, extra)]
            continue
        copies = range(extra + 1) if place.phase == "forward" else range(extra, -1, -1)
        for copy in copies:
            made += [event(*one, place) for one in layers.repeated(block, place.phase, copy, extra)]
    return made


def _before(shallow: Sequence[Event], four: Sequence[Event], more: int) -> Iterator[int]:
    """Sizes of what is alive before the step, in order: the three layers' with what a fourth adds, `more` times."""
    three_sizes, four_sizes = ([one.change for one in events if one.place == START] for events in (shallow, four))
    matcher = difflib.SequenceMatcher(None, three_sizes, four_sizes, autojunk=False)
    for tag, _, _, start, stop in matcher.get_opcodes():
        if tag not in ("equal", "insert"):
            raise ValueError("a further layer changes what lies there before the step")
        yield from four_sizes[start:stop] * (1 if tag == "equal" else more)


def _blocks(events: Sequence[Event]) -> Iterator[tuple[Place, list[Event]]]:
    """Runs of events at one place, after those before the step."""
    block: list[Event] = []
    for one in events:
        if one.place == START:
            continue
        if block and block[-1].place != one.place:
            yield block[0].place, block
            block = []
        block.append(one)
    if block:
        yield block[0].place, block


class _Layers:
    """Who was born where, and what the template leaves to its neighbours, in the order in which these free it."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._births = {one.storage: one.place for one in events if one.change > 0}
        if any(self._births[one.storage] == START for one in events if one.change < 0):
            raise ValueError("something dies that was there before the step")
        # (phase of the birth, phase of the death): storages of the template that the next layer frees.
        self._left = {
            # What is freed when a layer returns is freed behind the layers when the last one does.
            ("forward", "forward"): self._freed(
                events, "forward", _TEMPLATE, Place("forward", _BEHIND), Place("forward", after=True)
            ),
            ("forward", "backward"): self._freed(events, "forward", _TEMPLATE, Place("backward", _BEHIND)),
            ("backward", "backward"): self._freed(events, "backward", _TEMPLATE, Place("backward", _BEFORE)),
        }
        self._found = {
            ("forward", "forward"): self._freed(events, "forward", _BEFORE, Place("forward", _TEMPLATE)),
            ("forward", "backward"): self._freed(events, "forward", _BEFORE, Place("backward", _TEMPLATE)),
            ("backward", "backward"): self._freed(events, "backward", _BEHIND, Place("backward", _TEMPLATE)),
        }
        for ways, found in self._found.items():
            if len(found) != len(self._left[ways]):
                raise ValueError(f"a layer finds {len(found)} storages of the one before and leaves another number")

    def _freed(self, events: Sequence[Event], phase: str, layer: int, *places: Place) -> list[int]:
        born = Place(phase, layer)
        return [
            one.storage
            for one in events
            if one.change < 0 and one.place in places and self._births[one.storage] == born
        ]

    def outside(self, block: Sequence[Event], extra: int) -> Iterator[tuple[_Name, int]]:
        """Events of other places. What the template left dies here: of its neighbours in one copy, else in all."""
        for one in block:
            birth = self._births[one.storage]
            if one.change > 0 or birth.layer != _TEMPLATE:
                yield (one.storage, 0), one.change
            elif one.place.phase == "forward" or one.place == Place("backward", _BEHIND):
                yield (one.storage, extra), one.change
            elif one.place == Place("backward", _BEFORE) and birth.phase == "backward":
                yield (one.storage, 0), one.change
            else:
                yield from (((one.storage, copy), one.change) for copy in range(extra + 1))

    def repeated(self, block: Sequence[Event], phase: str, copy: int, extra: int) -> Iterator[tuple[_Name, int]]:
        """Events of one copy of the template; its neighbours are other copies, but for the first and the last."""
        for one in block:
            birth = self._births[one.storage]
            ways = birth.phase, phase
            if birth.layer == _TEMPLATE:
                yield (one.storage, copy), one.change
            elif one.storage in self._found.get(ways, ()):
                is_back = birth.phase == "backward"
                neighbour = copy + 1 if is_back else copy - 1
                if 0 <= neighbour <= extra:
                    left = self._left[ways][self._found[ways].index(one.storage)]
                    yield (left, neighbour), one.change
                else:
                    yield (one.storage, 0), one.change
            elif copy == (extra if phase == "forward" else 0):  # of no layer: it dies with its last user
                yield (one.storage, 0), one.change
