"""Sides in processes: each library in one of its own, the lab's sides in one, so that none slows another down.

A process holds its models and waits; only the one whose turn it is computes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lora_lab.data.encode import Encoded
from tests.benchmarks.train_compile import compile_regions
from tests.benchmarks.train_rows import COMPILED, RIVALS, Case, members_of, tokenizer_of
from tests.benchmarks.train_sides import Side, lab_side, run_rival
from tests.benchmarks.train_turns import Gone


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
def remote_sides(groups: Sequence[Task]) -> Iterator[list[Remote]]:
    """The sides of all groups, one process per group, started one after another so that none loads beside another."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes: list[Any] = []
    sides: list[Remote] = []
    try:
        for group in groups:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_sides, args=(theirs, group), daemon=True)
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
        for how in COMPILED:
            if side.endswith(how):
                compile_regions(found.network, how)
        return found
    except Exception as error:  # noqa: BLE001 - the other sides of this process go on
        return _Failed(f"{type(error).__name__}: {error}")
