"""pydantic's errors in the lab's words: where, what value, what rule, the nearest valid name."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from lora_lab.errors import Problem, nearest

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_TAG_ERRORS = ("union_tag_invalid", "union_tag_not_found")
# The keys that say which member of a union a mapping is.
_TAGS = ("kind", "rule")
_RULES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "finite_number": "must be finite",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def problems_of(error: ValidationError, model: type[BaseModel], mapping: Mapping[str, Any]) -> list[Problem]:
    """One Problem per wrong value. `mapping` is the input, to find the names that were valid beside a wrong one."""
    problems: dict[str, Problem] = {}
    for entry in error.errors():
        path = _path_without_tags(entry["loc"], mapping)
        if entry["type"] in _TAG_ERRORS and isinstance(entry["input"], Mapping):
            path.append(str(entry["ctx"]["discriminator"]).strip("'"))
        where = ".".join(path)
        message = _message(entry, path, model, mapping)
        # A union reports one error per member; a broken rule (the type was right) says most, a bare mismatch least.
        known = problems.get(where)
        if known is None or known.message.startswith("expected") or entry["type"] in _RULES:
            problems[where] = Problem(where, message)
    return list(problems.values())


def _message(entry: Any, path: Sequence[str], model: type[BaseModel], mapping: Mapping[str, Any]) -> str:
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + nearest(path[-1], _fields_at(model, path[:-1], mapping))
    if kind in ("missing", "union_tag_not_found"):
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("union_tag_invalid", "literal_error"):
        choices = [part.strip().strip("'") for part in _choices(context)]
        shown = _tag(value) if isinstance(value, Mapping) else value
        if shown is None or shown == "":
            return f"empty value ({_show(shown)}); expected one of {', '.join(choices)}"
        return f"no such choice {_show(shown)}" + nearest(str(shown), choices)
    if kind in _RULES:
        return f"{_RULES[kind].format(**context)}, got {_show(value)}"
    if kind in _EXPECTED:
        if value is None or value == "":
            return f"empty value ({_show(value)}); expected {_EXPECTED[kind]}"
        return f"expected {_EXPECTED[kind]}, got {_show(value)}{_number_hint(kind, value)}"
    return f"{entry['msg']}, got {_show(value)}"


def _choices(context: Mapping[str, Any]) -> list[str]:
    text = str(context.get("expected_tags", context.get("expected", "")))
    return text.replace(" or ", ", ").split(",")


def _show(value: object) -> str:
    """A value as it would be written in YAML, cut to a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _number_hint(kind: str, value: object) -> str:
    """`1e` was probably `1e-4`: the one slip that is common enough to name."""
    if kind.startswith("float") and isinstance(value, str) and value.rstrip("-+").endswith(("e", "E")):
        return f" (did you mean {value.rstrip('-+')}-4?)"
    return ""


def _path_without_tags(location: Sequence[int | str], mapping: Any) -> list[str]:
    """pydantic puts the chosen union member into the path (`data.skills.path`); users know only keys."""
    path: list[str] = []
    node: Any = mapping
    seen_tag = False
    for index, step in enumerate(location):
        last = index == len(location) - 1
        is_entry = isinstance(node, (list, tuple)) and isinstance(step, int) and step < len(node)
        if is_entry or (isinstance(node, Mapping) and step in node):
            path.append(str(step))
            node, seen_tag = cast(Any, node)[step], False
        elif isinstance(node, Mapping) and _tag(node) == step and not seen_tag:
            seen_tag = True
        elif last and not _is_type_tag(step):
            path.append(str(step))
    return path


def _is_type_tag(step: int | str) -> bool:
    return isinstance(step, str) and (step.endswith("]") or step in ("int", "float", "str", "bool"))


def _fields_at(model: type[BaseModel], path: Sequence[str], mapping: Mapping[str, Any]) -> list[str]:
    """Names that are valid at a path; for a union those of the member that `kind` chooses, or of all."""
    models: list[type[BaseModel]] = [model]
    node: Any = mapping
    for step in path:
        if isinstance(node, (list, tuple)):
            node = node[int(step)]
            models = [one for one in models if _is_of_kind(one, node)] or models
            continue
        node = node.get(step) if isinstance(node, Mapping) else None
        models = [
            inner
            for outer in models
            if step in outer.model_fields
            for inner in _models_in(outer.model_fields[step].annotation)
        ]
        models = [one for one in models if _is_of_kind(one, node)] or models
    return sorted({name for one in models for name in one.model_fields})


def _tag(node: Mapping[str, Any]) -> Any:
    return next((node[tag] for tag in _TAGS if tag in node), None)


def _is_of_kind(model: type[BaseModel], node: Any) -> bool:
    fields = [model.model_fields[tag] for tag in _TAGS if tag in model.model_fields]
    return isinstance(node, Mapping) and any(_tag(node) in typing.get_args(field.annotation) for field in fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []
