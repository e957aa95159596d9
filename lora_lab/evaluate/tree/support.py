"""Which models a tree mask is valid for."""

from __future__ import annotations

from torch import nn


def why_not_tree(model: nn.Module, *, depth: int) -> str | None:
    """Why `model` cannot be scored by a tree of inputs up to `depth` tokens; None where it can."""
    return None
