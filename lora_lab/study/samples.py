"""Scores of single examples from a run's eval folder: lm-eval's samples files, and the held-out rows.

A task's samples are in `samples_<task>.jsonl` or, as lm-eval's command writes them, `samples_<task>_<date>.jsonl`, at
any depth below the folder; of several dates the newest counts. A line has doc_id, doc_hash, filter and one value per
metric. The held-out rows are in `heldout.jsonl`, answers to the first of them in `answers.jsonl`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lab.errors import DataError, Problem
from lora_lab.record.run_record import ANSWERS_FILE, HELDOUT_FILE

_SAMPLES_FILE = re.compile(r"samples_(?P<task>.+?)(?:_(?P<date>\d{4}-\d{2}-\d{2}T[^_]*))?\.jsonl")
_NO_FILTER = "none"


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored example of a task. `scores` holds plain numbers only; `unpairable` says why a metric has none. `sums`:
    of metrics that are a sum over a sum, the example's log-likelihood in nats and its size (words or bytes)."""

    doc_id: int | None
    doc_hash: str | None
    filter: str
    scores: dict[str, float]
    unpairable: dict[str, str]
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeldoutRow:
    """One held-out row: loss summed over its loss tokens, in nats."""

    index: int
    loss_nats: float
    loss_tokens: int
    exact_match: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run's model answered to a held-out prompt. `is_complete`: it ended its turn itself."""

    prompt: str
    expected: str
    answer: str
    is_complete: bool


def samples_files(folder: Path) -> dict[str, Path]:
    """The newest samples file of each task."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        match = _SAMPLES_FILE.fullmatch(path.name)
        if match is None:
            continue
        task, date = match["task"], match["date"] or ""
        if date >= found.get(task, ("", path))[0]:
            found[task] = date, path
    return {task: path for task, (_, path) in sorted(found.items())}


def read_samples(path: Path) -> list[Sample]:
    """The samples of one task.

    Raises:
        DataError: a line is damaged; `where` is `path:line`.
    """
    return [_sample(line, where) for line, where in _lines(path)]


def _sample(line: dict[str, Any], where: str) -> Sample:
    names = line.get("metrics")
    if not isinstance(names, list) or not ("doc_id" in line or "doc_hash" in line):
        raise DataError(Problem(where, "not a line of lm-eval's samples (no metrics, or neither doc_id nor doc_hash)"))
    scores: dict[str, float] = {}
    unpairable: dict[str, str] = {}
    sums: dict[str, tuple[float, float]] = {}
    for name in map(str, names):
        value = line.get(name)
        if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
            sums[name] = float(value[0]), float(value[1])
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            scores[name] = float(value)
        elif isinstance(value, float):
            unpairable[name] = f"{where}: the score is {value}"
        else:
            unpairable[name] = "lm-eval keeps no single number per example for it"
    return Sample(
        line.get("doc_id"), line.get("doc_hash"), str(line.get("filter", _NO_FILTER)), scores, unpairable, sums
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def read_heldout(folder: Path) -> list[HeldoutRow] | None:
    """The held-out rows of a run, or None where it has no such file.

    Raises:
        DataError: a line is damaged; `where` is `path:line`.
    """
    path = folder / HELDOUT_FILE
    if not path.is_file():
        return None
    return [_heldout_row(line, where) for line, where in _lines(path)]


def read_answers(folder: Path) -> list[Answer]:
    """The sample answers of a run; none where it kept none.

    Raises:
        DataError: a line is damaged; `where` is `path:line`.
    """
    path = folder / ANSWERS_FILE
    if not path.is_file():
        return []
    answers = []
    for line, where in _lines(path):
        texts = [line.get(name) for name in ("prompt", "expected", "answer")]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(Problem(where, "not a sample answer: prompt, expected and answer must be texts"))
        prompt, expected, answer = map(str, texts)
        answers.append(Answer(prompt, expected, answer, line.get("is_complete") is True))
    return answers


def _heldout_row(line: dict[str, Any], where: str) -> HeldoutRow:
    try:
        match = line["exact_match"]
        row = HeldoutRow(
            index=int(line["index"]),
            loss_nats=float(line["loss"]),
            loss_tokens=int(line["loss_tokens"]),
            exact_match=None if match is None else float(match),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(Problem(where, f"not a held-out row: {type(error).__name__}: {error}")) from None
    if not math.isfinite(row.loss_nats) or row.loss_tokens < 1:
        raise DataError(Problem(where, f"loss {row.loss_nats} over {row.loss_tokens} tokens is not a score"))
    return row


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    number = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise DataError(Problem(f"{path}:{number}", "expected a JSON object"))
                yield value, f"{path}:{number}"
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read: {error.strerror}")) from None
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(f"{path}:{number}", f"damaged line: {error}")) from None


def matched(a: Sequence[Sample], b: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """The examples that both have, each once: by doc_hash where every line has one, else by doc_id.

    Examples with equal text are told apart by their order.
    """
    by_hash = all(sample.doc_hash is not None for sample in (*a, *b))
    first, second = _keyed(a, by_hash=by_hash), _keyed(b, by_hash=by_hash)
    return [(sample, second[key]) for key, sample in first.items() if key in second]


def _keyed(samples: Sequence[Sample], *, by_hash: bool) -> dict[tuple[object, ...], Sample]:
    seen: Counter[tuple[object, ...]] = Counter()
    keyed: dict[tuple[object, ...], Sample] = {}
    for sample in samples:
        identity = (sample.filter, sample.doc_hash if by_hash else sample.doc_id)
        keyed[(*identity, seen[identity])] = sample
        seen[identity] += 1
    return keyed
