"""Nested mappings as dotted keys, the form in which people name settings on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dotted(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`. Lists are values; an empty mapping stays as the value of its key."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(dotted(value, f"{path}."))
        else:
            flat[path] = value
    return flat
