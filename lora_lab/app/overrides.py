"""The command line's overrides, checked all at once before Hydra sees them.

Hydra reports the first bad override only, accepts a key given twice, and advises `+` for a misspelt one. Here every
override is parsed with Hydra's own parser, and what is wrong is said in the lab's words.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException

from lora_lab.errors import InputError, Problem

# Hydra's own settings that users may change: what reads or runs nothing, and writes nowhere.
_HYDRA_KEYS = re.compile(r"hydra/(launcher|sweeper)$|hydra\.(verbose$|mode$|searchpath$|sweeper\.params\.|launcher\.)")


@functools.cache
def parse(text: str) -> Override:
    """One override; raises InputError with a plain sentence for text that is not one."""
    key, equals, value = text.partition("=")
    if not key.strip() or (not equals and not text.startswith("~")):
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
    reason = str(error).splitlines()[0].partition(" expecting ")[0]
    return f"cannot read {text} ({reason}); text with special characters is written KEY='...' in quotes"


@dataclass(frozen=True, slots=True)
class Checked:
    """The overrides of a command line that are well-formed and open to users, and what is wrong with the others."""

    overrides: tuple[Override, ...]
    problems: tuple[Problem, ...]


def check(texts: Sequence[str]) -> Checked:
    """Parses all overrides. Problems: an override that does not parse, is given twice, cannot be enumerated, or reaches
    for settings of Hydra that could write outside the lab's root or run code."""
    problems: list[Problem] = []
    good: list[Override] = []
    seen: dict[str, str] = {}
    for text in texts:
        try:
            override = parse(text)
        except InputError as error:
            problems.extend(error.problems)
            continue
        key = override.key_or_group
        wrong = list(_content_problems(override))
        if key in seen:
            wrong.append(Problem(key, f"given twice: {seen[key]} and {text}"))
        seen[key] = text
        problems += wrong
        if not wrong:
            good.append(override)
    return Checked(tuple(good), tuple(problems))


def _content_problems(override: Override) -> Iterable[Problem]:
    key, text = override.key_or_group, override.input_line
    if "_target_" in key or _names_target(override.value()):
        yield Problem(key, "configuration holds values only; nothing is instantiated from it")
    elif key.startswith("hydra") and not _HYDRA_KEYS.match(key):
        yield Problem(key, "not open to users: the lab writes below root=DIR only; use root=, or hydra/launcher=")
    elif key.startswith("hydra") and override.is_sweep_override():
        yield Problem(key, f"settings of Hydra cannot be swept; a text with commas is written {key}='2,4'")
    elif override.package is not None:
        yield Problem(f"{key}@{override.package}", f"a choice cannot be put elsewhere; write {key}=...")
    if override.is_interval_sweep():
        yield Problem(key, f"{text}: an interval has no points to enumerate; use range() or a list of values")
    elif isinstance(override.value(), RangeSweep):
        yield from _range_problems(override)


def sweep_problems(override: Override) -> Iterable[Problem]:
    """What is wrong with a sweep in a call that is none."""
    key = override.key_or_group
    if override.is_sweep_override():
        yield Problem(key, f"{override.input_line} is a sweep, which needs -m; a list is written {key}=[a,b]")


def _range_problems(override: Override) -> Iterable[Problem]:
    sweep = override.value()
    if not all(math.isfinite(part) for part in (sweep.start, sweep.stop, sweep.step)):
        yield Problem(override.key_or_group, f"a range must be finite, got {override.input_line}")
    elif sweep.step == 0:
        yield Problem(override.key_or_group, f"range step is 0 in {override.input_line}")


def _names_target(value: object) -> bool:
    if isinstance(value, dict):
        return any("_target_" in str(key) or _names_target(inner) for key, inner in value.items())
    return isinstance(value, list) and any(map(_names_target, value))


def expand(overrides: Sequence[Override], *, max_runs: object) -> list[list[str]]:
    """All points of a sweep: the product of the swept values, the first axis slowest. Of two overrides of a key (from
    a configuration file and the command line) the later counts.

    Raises:
        InputError: where there is no point at all, or more than `max_runs`; counted before anything is enumerated.
    """
    if isinstance(max_runs, bool) or not isinstance(max_runs, int) or max_runs < 1:
        raise InputError(Problem("max_runs", f"expected an integer >= 1, got {max_runs}"))
    overrides = list({override.key_or_group: override for override in overrides}.values())
    sizes = [_size(override) for override in overrides]
    empty = [str(one.input_line) for one, size in zip(overrides, sizes, strict=True) if size == 0]
    if empty:
        raise InputError(f"no points to run: {', '.join(empty)} is empty")
    size = math.prod(sizes)
    if size > max_runs:
        raise InputError(Problem("max_runs", f"{size:,} runs; limit {max_runs:,}; pass max_runs={size} to allow it"))
    return [list(point) for point in itertools.product(*map(_values, overrides))]


def first_point(overrides: Sequence[Override]) -> list[str]:
    """One point of a sweep that cannot be enumerated, so that its other problems can be told as well."""
    point = []
    for override in overrides:
        sweep = override.value()
        if not _size(override):
            continue
        if isinstance(sweep, RangeSweep):  # a shuffled one would be enumerated for its first value
            point.append(f"{override.get_key_element()}={next(iter(sweep.range()))}")
        else:
            point += itertools.islice(_values(override), 1)
    return point


def _values(override: Override) -> Iterator[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return iter([f"{key}={override.get_value_element_as_str()}"])
    return (f"{key}={value}" for value in override.sweep_string_iterator())


def _size(override: Override) -> int:
    if not override.is_sweep_override():
        return 1
    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        start, stop, step = (Decimal(part) for part in (sweep.start, sweep.stop, sweep.step))
        return max(0, math.ceil((stop - start) / step))
    return sum(1 for _ in override.sweep_iterator())


def rewrite_choice(group: str, value: object, options: Sequence[str]) -> list[str] | None:
    """Overrides that say what the user meant where a group has no such choice; None where nothing is recognised.

    `model=./folder` and `model=org/name` name a local folder or a hub repository; `target=[q_proj,v_proj]`
    names modules.
    """
    if group == "model" and isinstance(value, str) and value not in options:
        if value.startswith(("./", "../", "/", "~")) or value in (".", "..") or _is_folder(value):
            return ["model=folder", f"model.path={_quoted(value)}"]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not value.startswith("."):
            return ["model=hub", f"model.repo='{value}'"]
    if group == "target" and isinstance(value, list) and value and not any(one in options for one in value):
        names = [_quoted(one) for one in value if isinstance(one, str)]
        return ["target=[]", f"target.modules=[{','.join(names)}]"] if len(names) == len(value) else None
    return None


def _is_folder(name: str) -> bool:
    try:
        return bool(name) and Path(name).is_dir()
    except (OSError, ValueError):  # too long, or a NUL inside
        return False


def _quoted(text: str) -> str:
    return str(QuotedString(text=text, quote=Quote.single).with_quotes())
