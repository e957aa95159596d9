"""The command line's overrides, checked all at once before Hydra sees them.

Hydra reports the first bad override only, accepts a key given twice, and advises `+` for a misspelt one. Here every
override is parsed with Hydra's own parser, and what is wrong is said in the lab's words.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException

from lora_lab.errors import InputError, Problem

# Hydra's own settings that users may change: what reads or runs nothing, and writes nowhere.
_HYDRA_KEYS = re.compile(r"hydra/|hydra\.(verbose$|mode$|searchpath$|sweeper\.params\.|launcher\.(?!_target_))")


@functools.cache
def parse(text: str) -> Override:
    """One override; raises InputError with a plain sentence for text that is not one."""
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        raise InputError(Problem(text, "expected KEY=VALUE"))
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise InputError(Problem(key, _syntax_message(text, value, error))) from None


def _syntax_message(text: str, value: str, error: Exception) -> str:
    for opening, closing in ("[]", "{}", "()"):
        if value.count(opening) > value.count(closing):
            return f'unclosed "{opening}" in {text}'
        if value.count(opening) < value.count(closing):
            return f'"{closing}" without "{opening}" in {text}'
    if value.rstrip().endswith(","):
        return f"trailing comma in {text}"
    return f"cannot read {text} ({str(error).splitlines()[0]})"


def check(texts: Sequence[str], *, multirun: bool) -> list[Override]:
    """All overrides of a command line, parsed.

    Raises:
        InputError: listing every override that does not parse, is given twice, sweeps without `-m`, or reaches for
            settings of Hydra that could write outside the lab's root or run code.
    """
    problems: list[Problem] = []
    parsed: list[Override] = []
    seen: dict[str, str] = {}
    for text in texts:
        try:
            override = parse(text)
        except InputError as error:
            problems.extend(error.problems)
            continue
        parsed.append(override)
        key = override.key_or_group
        if key in seen:
            problems.append(Problem(key, f"given twice: {seen[key]} and {text}"))
        seen[key] = text
        problems.extend(_content_problems(override, multirun=multirun))
    if problems:
        raise InputError(problems)
    return parsed


def _content_problems(override: Override, *, multirun: bool) -> Iterable[Problem]:
    key, text = override.key_or_group, override.input_line
    if "_target_" in key:
        yield Problem(key, "configuration holds values only; nothing is instantiated from it")
    elif key.startswith("hydra") and not _HYDRA_KEYS.match(key):
        yield Problem(key, "not open to users: the lab writes below root=DIR only; use root=, or hydra/launcher=")
    if override.is_sweep_override():
        if not multirun:
            yield Problem(key, f"{text} is a sweep, which needs -m; a list is written {key}=[a,b]")
        elif isinstance(override.value(), RangeSweep) and override.value().step == 0:
            yield Problem(key, f"range step is 0 in {text}")
        elif override.is_interval_sweep():
            yield Problem(key, f"{text}: an interval has no points to enumerate; use range() or a list of values")


def expand(overrides: Sequence[Override], *, max_runs: object) -> list[list[str]]:
    """All points of a sweep: the product of the swept values, the first axis slowest.

    Raises:
        InputError: where there is no point at all, or more than `max_runs`; counted before anything is enumerated.
    """
    if isinstance(max_runs, bool) or not isinstance(max_runs, int) or max_runs < 1:
        raise InputError(Problem("max_runs", f"expected an integer >= 1, got {max_runs}"))
    axes = [_values(override, limit=max_runs + 1) for override in overrides]
    size = math.prod(_size(override, axis) for override, axis in zip(overrides, axes, strict=True))
    if size == 0:
        empty = [one.input_line for one, axis in zip(overrides, axes, strict=True) if not axis]
        raise InputError(f"no points to run: {', '.join(empty)} is empty")
    if size > max_runs:
        raise InputError(Problem("max_runs", f"{size:,} runs; limit {max_runs:,}; pass max_runs={size} to allow it"))
    return [list(point) for point in itertools.product(*axes)]


def _values(override: Override, *, limit: int) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    return [f"{key}={value}" for value in itertools.islice(override.sweep_string_iterator(), limit)]


def _size(override: Override, axis: list[str]) -> int:
    sweep = override.value() if override.is_sweep_override() else None
    if isinstance(sweep, RangeSweep) and all(isinstance(part, int) for part in (sweep.start, sweep.stop, sweep.step)):
        return len(range(sweep.start, sweep.stop, sweep.step))
    return len(axis)


def rewrite_choice(group: str, value: object, options: Sequence[str]) -> list[str] | None:
    """Overrides that say what the user meant where a group has no such choice; None where nothing is recognised.

    `model=./folder` and `model=org/name` name a local folder or a hub repository; `target=[q_proj,v_proj]`
    names modules.
    """
    if group == "model" and isinstance(value, str) and value not in options:
        if Path(value).is_dir():
            return ["model=folder", f"model.path='{value}'"]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not value.startswith("."):
            return ["model=hub", f"model.repo='{value}'"]
    if group == "target" and isinstance(value, list) and value and not set(map(str, value)) & set(options):
        return ["target=[]", f"target.modules=[{','.join(map(str, value))}]"]
    return None
