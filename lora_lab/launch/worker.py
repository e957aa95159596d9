"""A worker's own side: does the work on its device, tells what happens, and says at the end how it went."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

import torch

from lora_lab.errors import LabError, Problem
from lora_lab.launch.relay import Relay
from lora_lab.record.watcher import Watcher

Value = TypeVar("Value")
# A top-level function or a partial of one, as it is pickled. It tells of runs only: `Watcher.begin` is its caller's.
Work = Callable[[torch.device, Watcher], Value]


@dataclass(frozen=True, slots=True)
class Done:
    """The work returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Stopped:
    """The work was interrupted by SIGTERM."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The work raised. error: None for a bug, of which `trace` is the traceback."""

    error: type[LabError] | None
    problems: tuple[Problem, ...]
    trace: str


def carry_out(work: Work[Any], device: torch.device, threads: int, writer: Connection) -> None:
    """All that a worker does. It must be started with SIGINT and SIGTERM blocked.

    `writer` gets the events of `relay.Relay`, then a Done, Stopped or Failed.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    relay = Relay(writer)
    end = _end_of(work, device, threads, relay)
    relay.close()
    with contextlib.suppress(BrokenPipeError):
        writer.send(end)


def _end_of(work: Work[Any], device: torch.device, threads: int, relay: Relay) -> Done | Stopped | Failed:
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return Done(work(device, relay))
    except KeyboardInterrupt:
        return Stopped()
    except LabError as error:
        return Failed(type(error), error.problems, "")
    except Exception as error:  # noqa: BLE001 - carried to the parent
        problem = Problem("", f"{type(error).__name__}: {error}")
        return Failed(None, (problem,), traceback.format_exc())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an interruption is answered once
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """A thread. An orphan would go on for hours, and hold runs that its user believes to be free."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
