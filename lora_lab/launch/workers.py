"""One process per device, all at the same work; leases in the ledger split it between them.

Workers are spawned, not forked (CUDA does not survive a fork), and each talks through a pipe of its own, so that one
that is killed in the middle of a word can neither block nor garble what the others say. What becomes of one device is
no matter for the others: they go on, and may take the runs of a lost worker, whose leases are free.

Ctrl-C and SIGTERM: the first is passed on to the workers as SIGTERM, in which the work sees a KeyboardInterrupt, once;
they are waited for. A second one kills them. A worker whose parent dies ends at once, as if it had been killed too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from types import FrameType, TracebackType
from typing import Any, Generic

import torch

from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.launch.relay import RunFinished, RunStarted, tell
from lora_lab.launch.worker import Done, Failed, Stopped, Value, Work, carry_out
from lora_lab.record.watcher import Watcher

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# `timeout` and some shells send one signal twice; only one that comes this much later is a second one.
_SECOND_SIGNAL_SECONDS = 1.0
# How often it is looked whether a silent worker is still there: a child of its own may hold its pipe open.
_LOOK_SECONDS = 1.0
# What a worker that has said its last word may take to go.
_EXIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Returned(Generic[Value]):
    """values: what the work returned, in the devices' order. problems: one per device on which it did not return."""

    values: tuple[Value, ...]
    problems: tuple[Problem, ...]


def run_on_devices(devices: Sequence[torch.device], work: Work[Value], watcher: Watcher) -> Returned[Value]:
    """The work on every device: a single one in this process, of several each in a process of its own.

    The CPU's threads are shared out among the workers. `watcher` is told, in this thread, what all of them tell; a run
    that was open in a lost worker is told a last phase. That a device is lost is said on stderr while others go on.

    Raises:
        KeyboardInterrupt: after a signal, when the workers have ended. The handler that was there before gets the
            signal first: Python's own for Ctrl-C raises this, that for SIGTERM ends the process.
        InputError, MachineError, RuntimeError: the work returned on no device; InputError if that is what every worker
            raised, RuntimeError, with the traceback, for a bug.
    """
    if len(devices) == 1:
        return Returned((work(devices[0], watcher),), ())
    workers: list[_Worker] = []
    with _Signals(workers) as signals:
        try:
            threads = _shares(torch.get_num_threads(), len(devices))
            for name, device, share in zip(_names(devices), devices, threads, strict=True):
                workers.append(_Worker(name, device, work, share))
                if signals.first is not None:
                    workers[-1].process.terminate()
            _listen(workers, watcher, signals)
        finally:
            for worker in workers:
                worker.put_away()
    if signals.first is not None:
        signal.raise_signal(signals.first)
        raise KeyboardInterrupt  # the handler that was there before has let it pass
    values = tuple(one.end.value for one in workers if isinstance(one.end, Done))
    if not values:
        raise _error_of(workers)
    return Returned(values, tuple(problem for one in workers if (problem := one.problem()) is not None))


class _Worker:
    """A process at work on a device, as its parent sees it. `end`: what it said last; None until then, or for ever."""

    def __init__(self, name: str, device: torch.device, work: Work[Any], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=carry_out, args=(work, device, threads, writer), name=f"worker {name}")
        self.end: Done | Stopped | Failed | None = None
        with _held_back():
            self.process.start()
        writer.close()  # the only one left is the worker's, so its death is the end of the stream

    def hear(self, watcher: Watcher, open_runs: dict[str, _Worker]) -> bool:
        """Passes on one event, and keeps the book of who is at which run; False where there will be no more."""
        try:
            said = self.reader.recv()
        except (EOFError, OSError):  # gone, perhaps in the middle of an event
            return False
        if isinstance(said, (Done, Stopped, Failed)):
            self.end = said
            return False
        if isinstance(said, RunStarted):
            open_runs[said.header.run_id] = self
        elif isinstance(said, RunFinished):
            open_runs.pop(said.header.run_id, None)
        tell(watcher, said)
        return True

    def is_silent(self) -> bool:
        """Whether its process has ended and nothing is left to hear."""
        return self.process.exitcode is not None and not self.reader.poll()

    def problem(self) -> Problem | None:
        """Why the work did not return; to be asked for once the worker has ended."""
        if isinstance(self.end, Done):
            return None
        if isinstance(self.end, Failed):
            return Problem(self.name, "; ".join(map(str, self.end.problems)))
        again = "the same command runs what it has not finished"
        if isinstance(self.end, Stopped):
            return Problem(self.name, f"its process was told to stop (SIGTERM); {again}")
        self.process.join(_EXIT_SECONDS)
        code = self.process.exitcode
        if code is None or code >= 0:
            return Problem(self.name, f"its process ended without a word (exit code {code}); {again}")
        memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return Problem(self.name, f"its process was killed by {signal.Signals(-code).name}{memory}; {again}")

    def put_away(self) -> None:
        """Waits for the process if it has said its last word, and ends it otherwise."""
        if self.end is not None:
            self.process.join(_EXIT_SECONDS)
        self.process.kill()
        self.process.join()
        self.reader.close()


class _Signals:
    """While it is entered, SIGINT and SIGTERM are for the workers (in the main thread; elsewhere none arrive).

    first: the one that came first, or None. A signal that this process ignores stays ignored.
    """

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._before: dict[signal.Signals, Any] = {}
        self._first_at = 0.0
        self.first: int | None = None

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._first_at = number, now
            for worker in self._workers:
                worker.process.terminate()
        elif now - self._first_at >= _SECOND_SIGNAL_SECONDS:
            for worker in self._workers:
                worker.process.kill()


def _listen(workers: Sequence[_Worker], watcher: Watcher, signals: _Signals) -> None:
    """Passes on what the workers say until the last has ended."""
    listening = list(workers)
    open_runs: dict[str, _Worker] = {}
    while listening:
        ready = connection.wait([one.reader for one in listening], timeout=_LOOK_SECONDS)
        for worker in list(listening):
            is_over = not worker.hear(watcher, open_runs) if worker.reader in ready else worker.is_silent()
            if not is_over:
                continue
            listening.remove(worker)
            problem = worker.problem()
            if problem is None or signals.first is not None:
                continue
            for run_id in [run_id for run_id, one in open_runs.items() if one is worker]:
                watcher.phase(run_id, f"lost with the worker of {worker.name}")
            if listening:
                _say_lost(worker, problem)


def _say_lost(worker: _Worker, problem: Problem) -> None:
    trace = worker.end.trace if isinstance(worker.end, Failed) else ""
    with contextlib.suppress(OSError):
        print(f"{trace}{problem}. The other devices go on.", file=sys.stderr)


def _error_of(workers: Sequence[_Worker]) -> Exception:
    """What to raise where no worker came to its end. What all of them say (that the disk is full) is said once."""
    problems = [problem for one in workers if (problem := one.problem()) is not None]
    failed = [one.end for one in workers if isinstance(one.end, Failed)]
    bug = next((one for one in failed if one.error is None), None)
    if bug is not None:
        return RuntimeError("\n".join([*map(str, problems), bug.trace]))
    said = {one.problems for one in failed}
    if len(failed) == len(workers) and len(said) == 1:
        problems = list(failed[0].problems)
    is_input = len(failed) == len(workers) and all(one.error and issubclass(one.error, InputError) for one in failed)
    return InputError(problems) if is_input else MachineError(problems)


def _names(devices: Sequence[torch.device]) -> list[str]:
    """`cuda:0`, `cuda:1`; of several on one device `cpu (1)`, `cpu (2)`."""
    counts, seen = Counter(map(str, devices)), Counter[str]()
    names = []
    for device in map(str, devices):
        seen[device] += 1
        names.append(f"{device} ({seen[device]})" if counts[device] > 1 else device)
    return names


def _shares(threads: int, workers: int) -> list[int]:
    """The threads that each worker gets: all of them together, and one at least."""
    share, rest = divmod(threads, workers)
    return [max(1, share + (index < rest)) for index in range(workers)]


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """A process started in here is born with both signals blocked: a Ctrl-C, which a terminal sends to all, is for the
    parent alone, and a SIGTERM waits until the work can be interrupted."""
    resource_tracker.ensure_running()  # would unblock them in the middle
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
