"""Shared by all tests: trials composed from the real conf/, a tiny random model, a cache that outlives one test run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.types import RunMode

from lora_lab.app.compose import Composer, config_loader
from lora_lab.schema.trial import LAB_KEYS, Trial, read_trial

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED_DATA = CHECKOUT.parent / "shared" / "data"

MakeTrial = Callable[..., Trial]


def pytest_configure(config: pytest.Config) -> None:
    """Tests never reach for a hub, and leave cores to each other."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def composer() -> Composer:
    """Composes overrides on the real conf/."""
    loader = config_loader()
    return Composer(loader, loader.load_configuration("config", [], RunMode.RUN))


@pytest.fixture(scope="session")
def make_trial(composer: Composer) -> MakeTrial:
    """make_trial("rank=4", "optimizer=sgd"): a validated trial; the tiny random model unless said otherwise."""

    def make(*overrides: str) -> Trial:
        lines = list(overrides)
        if not any(line.startswith("model=") for line in lines):
            lines.append("model=tiny_random")
        mapping = composer.compose(lines).mapping
        return read_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS})

    return make


@pytest.fixture(scope="session")
def cache() -> Path:
    """The checkout's own cache, so that the embedded model is converted once."""
    return CHECKOUT / "lab" / "cache"


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """For files whose models are so small that they gain nothing from a second core."""
    from tests.journey.program import single_thread

    with single_thread():
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all of one file."""
    return tmp_path_factory.mktemp("cache")
