"""Texts that others wrote, inside Markdown: shown as they are, on one line, without acting as markup.

Folders of this machine's disk are nobody's business: of an absolute path only the last part is kept.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lora_lab.record.environment import without_user_info

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_ABSOLUTE = re.compile(r"(?<![\w:/.])~?/(?:[^\s/'\"`,;()]+/)+")
_SIGNS = re.compile(r"([\\`*_\[\]<>~&$!#])")
# What GitHub's and the hub's Markdown make a link of, without any sign around it.
_LINK_STARTS = re.compile(r"(?<=:)/(?=/)|(?<=\bwww)\.", re.IGNORECASE)


def one_line(text: str) -> str:
    """`text` without line breaks, control characters, invisible direction marks, passwords in URLs and folders."""
    spaced = "".join(" " if sign.isspace() else sign for sign in text)
    visible = " ".join("".join(sign for sign in spaced if unicodedata.category(sign) not in _INVISIBLE).split())
    at_home = re.sub(rf"(?<![\w:/.-]){re.escape(str(Path.home()))}(?![\w-])", "~", visible)
    return _ABSOLUTE.sub("…/", without_user_info(at_home))


def prose(text: str) -> str:
    """A sentence or a name as text."""
    return _LINK_STARTS.sub(lambda found: f"\\{found[0]}", _SIGNS.sub(r"\\\1", one_line(text)))


def code(text: object) -> str:
    """A value as a code span."""
    line = one_line(str(text))
    if not line:
        return "(empty)"
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    """A cell ends at any stroke without a backslash, also inside code."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)
