"""Sides in turn: each in a process of its own (the lab's share one), one step at a time, so that none slows another
down and a machine whose speed drifts treats all alike.

A process holds its model and waits; only the one whose turn it is computes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_lab.data.encode import Encoded
from tests.benchmarks.train_rows import COMPILED, RIVALS, Case, members_of, tokenizer_of
from tests.benchmarks.train_sides import Side, compile_layers, lab_side, run_rival

# Steps of a turn: a side of one run takes as many as there are here, one of more runs as many fewer.
STEPS_OF_A_TURN = 2


class Gone(Exception):  # noqa: N818 - not an error of the benchmark
    """A side that cannot go on: why."""


class Stepped(Protocol):
    """What takes turns."""

    def step(self) -> int:
        """One step; real tokens. Gone: the side has none to take any more."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Real tokens of the steps of a turn, and their wall seconds."""

    tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        """Real tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Task:
    """What a process is started with. log: gets what the libraries print in it."""

    case: Case
    sides: Sequence[str]
    rows: Sequence[Encoded]
    cache: Path
    threads: int
    log: Path


@dataclass(frozen=True, slots=True)
class _Failed:
    reason: str


class Remote:
    """A side in another process."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection

    def step(self) -> int:
        """One step there; real tokens.

        Raises:
            Gone: it failed, or its process has ended.
        """
        try:
            self._connection.send(self.name)
            answer: Any = self._connection.recv()
        except (EOFError, OSError):
            raise Gone("its process has ended; out of memory is the usual reason") from None
        if isinstance(answer, _Failed):
            raise Gone(answer.reason)
        return int(answer)


@contextlib.contextmanager
def remote_sides(
    groups: Sequence[Task], serve: Callable[[Connection, Task], None] | None = None
) -> Iterator[list[Remote]]:
    """The sides of all groups, one process per group, started one after another so that none loads beside another."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes: list[Any] = []
    sides: list[Remote] = []
    try:
        for group in groups:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve or serve_sides, args=(theirs, group), daemon=True)
            process.start()
            theirs.close()
            with contextlib.suppress(EOFError):
                ours.recv()
            ends.append(ours)
            processes.append(process)
            sides += [Remote(side, ours) for side in group.sides]
        yield sides
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                end.send(None)
        for process, end in zip(processes, ends, strict=True):
            process.join(timeout=60)
            if process.is_alive():
                process.kill()
                process.join()
            end.close()


def serve_sides(connection: Connection, task: Task) -> None:
    """The other process: says when it is ready, then answers each name of a side with the tokens of one step."""
    torch.set_num_threads(task.threads)
    write_to(task.log)
    try:
        if task.sides[0] in RIVALS:
            _serve_rival(connection, task)
        else:
            _serve_lab(connection, task)
    except Exception as error:  # noqa: BLE001 - whatever it was, the table says it
        with contextlib.suppress(OSError):
            connection.send(_Failed(f"{type(error).__name__}: {error}"))


def write_to(log: Path) -> None:
    """From now on this process prints there: progress bars of many processes at once are nothing to read."""
    with log.open("a") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)


def _serve_rival(connection: Connection, task: Task) -> None:
    (side,) = task.sides

    def hold(tokens: int) -> bool:
        connection.send(tokens)
        return connection.recv() is not None

    (trial,) = task.case.trials(1)
    connection.send("ready")
    if connection.recv() is not None:
        run_rival(side, trial, task.rows, tokenizer_of(task.case, task.cache), task.cache, hold=hold)


def _serve_lab(connection: Connection, task: Task) -> None:
    built: dict[str, Side | _Failed] = {side: _built(side, task) for side in task.sides}
    connection.send("ready")
    while (name := connection.recv()) is not None:
        side = built[name]
        if isinstance(side, Side):
            try:
                connection.send(side.step())
                continue
            except Exception as error:  # noqa: BLE001 - the other sides of this process go on
                side = built[name] = _Failed(f"{type(error).__name__}: {error}")
        connection.send(side)


def _built(side: str, task: Task) -> Side | _Failed:
    try:
        found = lab_side(task.case.trials(members_of(side)), task.rows, task.cache)
        if side.endswith(COMPILED):
            compile_layers(found.network)
        return found
    except Exception as error:  # noqa: BLE001 - the other sides of this process go on
        return _Failed(f"{type(error).__name__}: {error}")


def take_turns(
    sides: Mapping[str, Stepped],
    *,
    turns: int,
    steps: Mapping[str, int],
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """`turns` turns of each side after `warm_up` steps that are not measured; who is first changes with every round.

    Returns the turns of each side that took them all, and why the others did not.
    """
    found: dict[str, list[Turn]] = {name: [] for name in sides}
    gone: dict[str, str] = {}
    names = list(sides)
    for index in range(-warm_up, turns):
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            if name in gone:
                continue
            count = steps[name] if index >= 0 else 1
            begin = clock()
            try:
                tokens = sum(sides[name].step() for _ in range(count))
            except Gone as reason:
                gone[name] = str(reason)
                del found[name]
                continue
            if index >= 0:
                found[name].append(Turn(tokens, clock() - begin))
    return found, gone


def steps_of_a_turn(side: str) -> int:
    """A turn of a side with few runs is too short for the clock, one with many needs no second step."""
    return max(1, STEPS_OF_A_TURN // members_of(side))


def summary(turns: Mapping[str, Sequence[Turn]], against: str) -> dict[str, dict[str, Any]]:
    """Of each side its speeds with median, least and most, and how many times as fast as `against` it was in the same
    round, with median, least and most."""
    found = {}
    for name, own in turns.items():
        speeds = [turn.speed for turn in own]
        ratios = [mine.speed / other.speed for mine, other in zip(own, turns.get(against, ()), strict=False)]
        found[name] = {
            "turns": [asdict(turn) for turn in own],
            "tokens_per_second": _spread(speeds),
            "ratio": _spread(ratios) if ratios else None,
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
