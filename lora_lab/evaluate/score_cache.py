"""Answers of a model to lm-eval's requests, kept as JSON under a key of all that they depend on.

lm-eval's own caches know a request's text alone, so that one adapter is handed the scores of another; they are never
used. Here the key is a hash of the facts (model, settings, tasks: `remembering`) and of the requests themselves, all of
them and in order, because a score depends a little on what is computed beside it. Any change is a miss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora_lab.errors import LabError
from lora_lab.record.atomic import read_json, write_json

RequestType = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
# Raised by one when older files are not to be read any more.
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Answers:
    """values: one per request, of the types that lm-eval's model calls return. notes: what else the call had to tell.
    key: under which they are kept. from_cache: whether nothing was computed."""

    values: list[Any]
    notes: dict[str, Any]
    key: str
    from_cache: bool


class ScoreCache:
    """A folder of answers, one file per key. Processes may share it: a file is whole or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def answers(
        self,
        request_type: RequestType,
        requests: Sequence[Any],
        facts: Mapping[str, Any],
        compute: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]],
    ) -> Answers:
        """The kept answers to lm-eval's `requests` under `facts`, or those of `compute`, which are then kept.

        facts: JSON values; all that the answers depend on beside the requests. compute: answers, and notes (JSON
        values) that are to be known again with them. Floats come back to the last bit. A file that is damaged, cut off,
        or not one of these is no error: it is computed and written anew. Answers that are not finite are not kept.

        Raises:
            MachineError: the disk refuses to write.
            ValueError: an unknown kind of request, or facts, notes or arguments that JSON has no form for.
        """
        if request_type not in get_args(RequestType):
            raise ValueError(f"request_type: expected one of {', '.join(get_args(RequestType))}, got {request_type!r}")
        about = {
            "schema_version": SCHEMA_VERSION,
            "request_type": request_type,
            "requests": len(requests),
            "requests_sha256": requests_digest(requests),
            "facts": json.loads(_canonical(facts)),
        }
        key = _sha256(about)
        path = self._folder / f"{key}.json"
        kept = _read(path, about)
        if kept is not None:
            return Answers(_values(request_type, kept["answers"]), kept["notes"], key, True)
        computed, notes = compute()
        values = _values(request_type, computed)
        if len(values) != len(requests):
            raise ValueError(f"{len(requests)} requests have {len(values)} answers")
        if all(math.isfinite(one) for one in _numbers(values)):
            content = {"answers": values, "notes": dict(notes)}
            write_json(path, about | content | {"content_sha256": _sha256(content)})
        return Answers(values, dict(notes), key, False)


def requests_digest(requests: Sequence[Any]) -> str:
    """SHA-256 (hex) over lm-eval's requests in their order: kind, task, and every argument.

    Arguments are texts, token ids or settings of generation; ValueError for what JSON has no form for.
    """
    digest = hashlib.sha256()
    for request in requests:
        digest.update(_canonical([request.request_type, request.task_name, list(request.args)]).encode())
        digest.update(b"\n")  # JSON in one line holds none
    return digest.hexdigest()


def _read(path: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the file holds, or None where it is not there or not the file that was written."""
    try:
        found = read_json(path)
        content = {"answers": found["answers"], "notes": found["notes"]}
        is_whole = found["content_sha256"] == _sha256(content) and len(content["answers"]) == about["requests"]
        is_right = {key: found[key] for key in about} == about
    except (LabError, KeyError, TypeError, ValueError):
        return None
    return content if is_whole and is_right and isinstance(content["notes"], dict) else None


def _values(request_type: str, answers: Sequence[Any]) -> list[Any]:
    """Answers in Python's own types: NumPy's and torch's numbers become exact floats."""
    if request_type == "loglikelihood":
        return [(float(value), bool(is_greedy)) for value, is_greedy in answers]
    return [str(text) for text in answers] if request_type == "generate_until" else [float(one) for one in answers]


def _numbers(values: Sequence[Any]) -> list[float]:
    firsts = [value[0] if isinstance(value, tuple) else value for value in values]
    return [one for one in firsts if isinstance(one, float)]


def _canonical(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"no part of a key for scores: {error}") from error


def _sha256(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
