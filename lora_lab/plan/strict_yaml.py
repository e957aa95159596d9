"""YAML files that people write, read without the traps of YAML 1.1 and without running anything.

What is read: mappings, lists, text, numbers, `true`/`false`, `null`. What differs from PyYAML's safe loader: `1e-4` is
a number; `off`, `no` and `yes` are text, as on the command line; so are dates, `1:30` and `010`. A duplicate key, an
alias (ten of them can stand for a billion values), a tag such as `!!python/object`, deep nesting and a file over 1 MB
are refused, with line and column where there is one.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.reader import ReaderError

from lora_lab.errors import InputError, Problem

SIZE_LIMIT_BYTES = 1_000_000
_DEPTH_LIMIT = 20
_NODE_LIMIT = 50_000  # parsing takes about 15 microseconds a node

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    (f"{_TAG}null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (f"{_TAG}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (f"{_TAG}int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    (
        f"{_TAG}float",
        re.compile(
            r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML file's content and where each part of it stands."""

    path: Path
    content: dict[str, Any]
    _root: yaml.Node

    def where(self, keys: Sequence[str]) -> str:
        """`file:line:column` of the value at a path of keys and indices, or of its deepest ancestor that exists."""
        node = self._root
        for key in keys:
            inner = _child(node, key)
            if inner is None:
                break
            node = inner
        return _place(self.path, node.start_mark)


def read_yaml(path: Path) -> Document:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is unreadable, too large, not UTF-8, not one YAML mapping, or uses what is refused here.
    """
    text = _text(path)
    try:
        root = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(Problem(_place(path, mark), str(error.problem or error.context))) from None
    except ReaderError as error:
        place = _place_of_offset(path, text, error.position)
        raise InputError(Problem(place, f"character U+{int(error.character):04X} is not allowed")) from None
    if not isinstance(root, yaml.MappingNode):
        found = "an empty file" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "one value"
        raise InputError(Problem(str(path), f"expected a mapping of keys to values, got {found}"))
    return Document(path, _mapping(root, path), root)


class _Loader(yaml.SafeLoader):
    """Used up to the node tree only: values are made by `_value`, so that no tag can reach a constructor."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - none of PyYAML's own
    _depth = 0
    _nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, "aliases (*name) are not taken; write the value out")
        if event.tag is not None:
            shown = str(event.tag).replace(_TAG, "!!")[:100]
            self._refuse(event, f"the tag {shown} is not taken; write plain values")
        self._nodes += 1
        if self._nodes > _NODE_LIMIT:
            self._refuse(event, f"more than {_NODE_LIMIT:,} keys and values")
        self._depth += 1
        if self._depth > _DEPTH_LIMIT:
            self._refuse(event, f"nested more than {_DEPTH_LIMIT} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    @staticmethod
    def _refuse(event: Any, problem: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(SIZE_LIMIT_BYTES + 1)
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot read: {error.strerror}")) from None
    if len(raw) > SIZE_LIMIT_BYTES:
        raise InputError(Problem(str(path), f"larger than {SIZE_LIMIT_BYTES} bytes"))
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]:
        raise InputError(Problem(str(path), "encoded as UTF-16 or UTF-32; save it as UTF-8"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(Problem(f"{path}:{line}", f"byte 0x{raw[error.start]:02x} is not UTF-8")) from None


def _value(node: yaml.Node, path: Path) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, path) for item in node.value]
    return _scalar(node, path)


def _mapping(node: yaml.MappingNode, path: Path) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        place = _place(path, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(Problem(place, "expected a plain name as key"))
        key = key_node.value
        if key in mapping:
            raise InputError(Problem(place, f'key "{key[:100]}" is given twice (first on line {first_lines[key]})'))
        mapping[key] = _value(value_node, path)
        first_lines[key] = key_node.start_mark.line + 1
    return mapping


def _scalar(node: yaml.Node, path: Path) -> Any:
    text = str(node.value)
    kind = str(node.tag).removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise InputError(Problem(_place(path, node.start_mark), f'"{text[:100]}" is not a number that fits')) from None
    return text


def _child(node: yaml.Node, key: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for name, value in node.value if name.value == key), None)
    if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
        item = node.value[int(key)]
        return item if isinstance(item, yaml.Node) else None
    return None


def _place(path: Path, mark: yaml.Mark | None) -> str:
    return str(path) if mark is None else f"{path}:{mark.line + 1}:{mark.column + 1}"


def _place_of_offset(path: Path, text: str, offset: int) -> str:
    line_start = text.rfind("\n", 0, offset) + 1
    return f"{path}:{text.count(chr(10), 0, offset) + 1}:{offset - line_start + 1}"
