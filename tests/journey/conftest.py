"""Journeys share one cache and run on one core, as the processes do that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journey.program import Lab, single_thread


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny random models are made."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def lab(tmp_path: Path, tiny_cache: Path) -> Lab:
    """An empty lab."""
    return Lab(tmp_path / "lab", tiny_cache)


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    """Sums in the order of a single thread, so that scores can be compared byte for byte. For each file anew, so that
    what the files before it imported is left out of garbage collection too."""
    with single_thread():
        yield
