"""Which cases `make test` runs of a test with many: a few, while `make test-long` runs all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow


def mostly_slow(values: Iterable[Any], *, keep: Iterable[Any]) -> list[Any]:
    """Cases for `parametrize` of one name: all of `values` in their order, and those that are not in `keep` slow.

    Raises:
        ValueError: one to keep is no case, or all are kept, or none.
    """
    cases, kept = list(values), list(keep)
    if unknown := [one for one in kept if one not in cases]:
        raise ValueError(f"not among the cases: {unknown}")
    if not 0 < len(kept) < len(cases):
        raise ValueError(f"{len(kept)} of {len(cases)} cases to keep: a test of one tier needs none of this")
    return [case if case in kept else pytest.param(case, marks=SLOW) for case in cases]
