"""Questions that a process of their own answers: what it imports may hang or crash, and only that answer is lost.

A question is a name of a function in a module of this package and JSON arguments; its answer is JSON. The process gets
all questions at once and answers one after another, so that torch is imported once. Where it dies or is silent for too
long, the question it was at is answered by that, and a new process goes on with the next.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import lora_lab
from lora_lab.errors import LabError

_PACKAGE = "lora_lab.app."
_ENDED = None


@dataclass(frozen=True, slots=True)
class Question:
    """`function` is `module:name` below `lora_lab.app`; `seconds` is how long its answer may take."""

    function: str
    arguments: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """`value` is what the function returned; where it did not, `trouble` says why, and `is_expected` is true for an
    error that the lab raises on purpose."""

    value: Any
    trouble: str | None = None
    is_expected: bool = False


def ask(questions: Sequence[Question], *, environment: Mapping[str, str] | None = None) -> Iterator[Answer]:
    """One answer for each question, in order, as soon as it is known. `environment`: variables for the process."""
    rest = list(questions)
    while rest:
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = _start(rest, errors, environment or {})
            try:
                lines = _lines_of(process)
                while rest:
                    answer = _next_answer(process, lines, errors, seconds=rest[0].seconds)
                    is_alive = answer.trouble is None or process.poll() is None
                    rest.pop(0)
                    yield answer
                    if not is_alive:
                        break
            finally:
                process.kill()
                process.wait()


def main() -> None:
    """The process: reads the questions from its input, writes one answer a line; what libraries print is dropped."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for question in json.load(sys.stdin):
        answers.write(json.dumps(_answer(question["function"], question["arguments"])) + "\n")
        answers.flush()


def _answer(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    module, _, name = function.partition(":")
    try:
        return {"value": getattr(importlib.import_module(_PACKAGE + module), name)(**arguments)}
    except LabError as error:
        return {"trouble": "; ".join(map(str, error.problems)), "is_expected": True}
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the answer
        told = " ".join(str(error).split())
        return {"trouble": f"{type(error).__name__}: {told}" if told else type(error).__name__}


def _start(questions: Sequence[Question], errors: IO[str], more: Mapping[str, str]) -> subprocess.Popen[str]:
    path = [str(Path(lora_lab.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lora_lab.app.questions"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stream:  # its end says more than the pipe
        json.dump([{"function": one.function, "arguments": dict(one.arguments)} for one in questions], stream)
    return process


def _lines_of(process: subprocess.Popen[str]) -> queue.SimpleQueue[str | None]:
    """The lines of a process as they come, then None; a thread reads them, since a pipe cannot be read with a limit."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(_ENDED)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _next_answer(
    process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None], errors: IO[str], *, seconds: float
) -> Answer:
    try:
        line = lines.get(timeout=seconds)
    except queue.Empty:
        process.kill()
        process.wait()
        return Answer(None, f"no answer within {seconds:g} s")
    if line is _ENDED:
        return Answer(None, f"the process that looked {_end_of(process.wait(), errors)}")
    return Answer(**{"value": None, **json.loads(line)})


def _end_of(code: int, errors: IO[str]) -> str:
    """How a process ended, with the last thing that it said."""
    errors.seek(0)
    said = [line.strip() for line in errors if line.strip()]
    last = f" ({said[-1][:200]})" if said else ""
    if code < 0:
        return f"was ended: {signal.strsignal(-code) or f'signal {-code}'}{last}"
    return f"ended with exit code {code}{last}"


if __name__ == "__main__":
    main()
