"""What lm-eval would change around us, held still: global random state, the console, caches at home, the network."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.loggers.utils import add_env_info

_SWITCHES = {"DISABLE_MULTIPROC": "1"}  # its bootstrap would fork a process with torch threads in it


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """lm-eval seeds Python, NumPy and torch globally; afterwards they are as they were."""
    python, numeric, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextlib.contextmanager
def console_to(path: Path) -> Iterator[None]:
    """What lm-eval and datasets print and log goes to a file: their progress bars would tear ours apart."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    with path.open("w", encoding="utf-8") as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
        for logger in loggers:
            logger.propagate = False
            logger.setLevel(logging.WARNING)
            logger.addHandler(handler)
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield
        finally:
            for logger, (propagate, level) in zip(loggers, before, strict=True):
                logger.removeHandler(handler)
                logger.propagate = propagate
                logger.setLevel(level)


@contextlib.contextmanager
def one_environment_report() -> Iterator[None]:
    """lm-eval describes the machine after every call, which takes over a second: here once per process.

    It also asks git about the folder the user happens to be in, which complains on the terminal where that is no
    checkout; the ledger records the code's version itself.
    """
    before = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info = lambda storage: storage.update(_environment_report())
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = before


@functools.cache
def _environment_report() -> dict[str, Any]:
    report: dict[str, Any] = {}
    add_env_info(report)
    return report


@contextlib.contextmanager
def data_cache(cache: Path, *, offline: bool) -> Iterator[None]:
    """`datasets` writes below `cache`; with `offline` neither it nor the hub client asks the network."""
    changes: list[tuple[Any, str, Any]] = [
        (datasets.config, "HF_DATASETS_CACHE", cache / "datasets"),
        (datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "datasets" / "downloads"),
        (datasets.config, "EXTRACTED_DATASETS_PATH", cache / "datasets" / "downloads" / "extracted"),
    ]
    if offline:
        changes += [(datasets.config, "HF_HUB_OFFLINE", True), (huggingface_hub.constants, "HF_HUB_OFFLINE", True)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    environment = {name: os.environ.get(name) for name in _SWITCHES}
    for owner, name, value in changes:
        setattr(owner, name, value)
    os.environ.update(_SWITCHES)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        for name, setting in environment.items():
            if setting is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = setting
