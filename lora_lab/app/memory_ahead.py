"""Predictions of many trials on all cores: processes leave them in the cache, where the command then finds them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from lora_lab.app.memory_predicted import Predictor, progress_of
from lora_lab.plan.devices import DeviceMemory
from lora_lab.plan.job import Job

# Fewer are predicted before the processes are there.
_WORTH_IT = 3


def predict_ahead(jobs: Sequence[Job], predictor: Predictor, device: DeviceMemory | None) -> None:
    """Predicts what is not kept yet of `jobs`, each distinct step once; with a device, what fits there too.

    Processes are forked, since a fresh one would import for longer than it predicts; where a system cannot do that
    safely, or has one core, nothing is done here, and predictions are made one by one when they are asked for.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if cores == 1 or len(jobs) < _WORTH_IT:
        return
    todo = {key: job for job in jobs if (key := predictor.key_of_new(job)) is not None}
    if len(todo) < _WORTH_IT:
        return
    work = functools.partial(_predict, predictor, device)
    context = multiprocessing.get_context("fork")
    with (
        progress_of(len(todo)) as advance,
        ProcessPoolExecutor(min(cores, len(todo)), mp_context=context, initializer=_begin) as pool,
    ):
        for done in as_completed([pool.submit(work, job) for job in todo.values()]):
            done.result()
            advance()


def _begin() -> None:
    import torch

    torch.set_num_threads(1)  # threads of the parent are not there after a fork


def _predict(predictor: Predictor, device: DeviceMemory | None, job: Job) -> None:
    found = predictor.of(job)
    if device is not None and not isinstance(found, str):
        rows, prediction = found
        predictor.fit(job.trial, rows, prediction, device)
