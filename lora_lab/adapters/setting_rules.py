"""Rules for the settings of an adapter folder: each says of a value what is wrong with it, or None."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

# What is wrong with a value, or None.
Rule = Callable[[Any], str | None]

_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")


def anything(value: Any) -> str | None:
    """Whatever it says changes nothing."""
    return None


def count(value: Any) -> str | None:
    """An integer >= 1."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if is_count else f"expected an integer >= 1, got {value!r}"


def optional_count(value: Any) -> str | None:
    """An integer >= 1, or nothing."""
    return None if value is None else count(value)


def optional_steps(value: Any) -> str | None:
    """An integer >= 0, or nothing."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if value is None or is_count else f"expected an integer >= 0, got {value!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: Any) -> str | None:
    """A finite number > 0."""
    return None if _is_number(value) and value > 0 else f"expected a finite number > 0, got {value!r}"


def not_negative(value: Any) -> str | None:
    """A finite number >= 0, or nothing."""
    ok = value is None or (_is_number(value) and value >= 0)
    return None if ok else f"expected a finite number >= 0, got {value!r}"


def share(value: Any) -> str | None:
    """A number in [0, 1), or nothing."""
    ok = value is None or (_is_number(value) and 0 <= value < 1)
    return None if ok else f"expected a number >= 0 and < 1, got {value!r}"


def flag(value: Any) -> str | None:
    """True, false or nothing."""
    return None if value is None or isinstance(value, bool) else f"expected true or false, got {value!r}"


def text(value: Any) -> str | None:
    """A text, or nothing."""
    return None if value is None or isinstance(value, str) else f"expected a text, got {value!r}"


def one_of(*choices: Any) -> Rule:
    """One of `choices`, of its very type."""

    def rule(value: Any) -> str | None:
        is_choice = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if is_choice else f"expected one of {', '.join(map(str, choices))}, got {value!r}"

    return rule


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def names(value: Any) -> str | None:
    """Module names: no regular expression, which could take for ever."""
    if isinstance(value, list) and value and all(map(_is_name, value)):
        return None
    return "expected a list of module names (regular expressions are not accepted)"


def optional_names(value: Any) -> str | None:
    """Module names, or nothing."""
    return names(value) if value else None


def by_name(rule: Rule) -> Rule:
    """A mapping from module names to values that keep `rule`, or nothing."""

    def check(value: Any) -> str | None:
        if not value:
            return None
        if not isinstance(value, dict) or not all(map(_is_name, value)):
            return "expected module names as keys (regular expressions are not accepted)"
        wrong = [f"{key}: {message}" for key, one in value.items() if (message := rule(one))]
        return wrong[0] if wrong else None

    return check


def mask(value: Any) -> str | None:
    """A list of true and false."""
    is_mask = isinstance(value, list) and bool(value) and all(isinstance(entry, bool) for entry in value)
    return None if is_mask else "expected a list of true and false"


def plain_init(value: Any) -> str | None:
    """Initialisations that change the base are out: the adapter's weights alone would not give the model back."""
    if value in (None, True, False, "gaussian"):
        return None
    return f"{value!r} changes the base weights, so the adapter's file alone does not say what was trained"
