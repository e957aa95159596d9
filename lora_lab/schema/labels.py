"""Names that users give: labels only, never a path by themselves."""

from __future__ import annotations

import re

_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")


def check_label(label: str | None) -> str | None:
    """The label itself; raises ValueError where it could escape a folder or upset a shell."""
    if label is None or _LABEL.fullmatch(label):
        return label
    shown = label if len(label) <= 80 else f"{label[:77]}..."
    raise ValueError(f"expected 1 to 80 of A-Z a-z 0-9 . _ -, not starting with . or -, got {shown!r}")
