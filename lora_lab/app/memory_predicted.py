"""The predictor as commands use it: bound to a device and a style, its refusals as reasons, its progress on stderr.

torch comes in with the first prediction.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lora_lab.plan.devices import DeviceMemory
from lora_lab.plan.fit import Fit, Suggestion, closest_that_fit, fit_of
from lora_lab.plan.job import Job
from lora_lab.plan.prediction import DeviceKind, LongestRows, Prediction, Style
from lora_lab.plan.timeline import Timeline
from lora_lab.report.grid import console_for
from lora_lab.schema.trial import Trial

NOTHING_TRAINED = "method=base trains nothing"


@dataclass(frozen=True, slots=True)
class Predictor:
    """Of trials on one kind of device, in one style. cache: where predictions and data sets are kept."""

    kind: DeviceKind
    style: Style
    cache: Path

    def of(self, job: Job) -> tuple[LongestRows, Prediction] | str:
        """The rows of the largest step with what is predicted of it; or why nothing can be predicted."""
        from lora_lab.predict.predictor import Unpredictable, rows_of

        if job.trial.method.kind == "base":
            return NOTHING_TRAINED
        try:
            rows = rows_of(job, cache=self.cache)
            return rows, self.predict(job.trial, rows)
        except Unpredictable as error:
            return error.reason

    def key_of_new(self, job: Job) -> str | None:
        """What a step is known by, if its prediction is not kept; None where it is, or where there is nothing to do."""
        from lora_lab.predict.predictor import kept_path, key_of, rows_of

        if job.trial.method.kind == "base":
            return None
        key = key_of(job.trial, rows_of(job, cache=self.cache), device_kind=self.kind, style=self.style)
        return None if kept_path(self.cache, key).exists() else key

    def predict(self, trial: Trial, rows: LongestRows) -> Prediction:
        """A prediction; raises `predictor.Unpredictable`."""
        from lora_lab.predict.predictor import predict

        return predict(trial, rows, device_kind=self.kind, style=self.style, cache=self.cache)

    def fit(self, trial: Trial, rows: LongestRows, prediction: Prediction, device: DeviceMemory) -> Fit | str:
        """Whether it fits, and how often; or why that is not known (another micro-batch cannot be predicted)."""
        from lora_lab.predict.predictor import Unpredictable

        try:
            return fit_of(trial, rows, prediction, device, self.predict)
        except Unpredictable as error:
            return error.reason

    def closest(self, trial: Trial, rows: LongestRows, device: DeviceMemory) -> list[Suggestion] | str:
        """The closest settings that fit; or why they are not known."""
        from lora_lab.predict.predictor import Unpredictable

        try:
            return closest_that_fit(trial, rows, device, self.predict)
        except Unpredictable as error:
            return error.reason

    def timeline(self, job: Job) -> Timeline:
        """The step of a trial that can be predicted, in full depth."""
        from lora_lab.predict.predictor import rows_of, trace

        return trace(job.trial, rows_of(job, cache=self.cache), device_kind=self.kind, style=self.style)


@contextlib.contextmanager
def progress_of(total: int) -> Iterator[Callable[[], None]]:
    """Done of `total` on stderr while the block runs, in a terminal; the block calls what it gets after each trial."""
    console = console_for(sys.stderr)
    columns = (TextColumn("memory"), BarColumn(), MofNCompleteColumn())
    is_shown = console.is_terminal and not console.is_dumb_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as progress:
        task = progress.add_task("memory", total=total)
        yield functools.partial(progress.advance, task)
