"""Predicted memory of a training step against the same step on this machine's real tensors, trial by trial.

python -m tests.benchmarks.memory_measured --output memory_measured.json

Measured are the live bytes of real tensors on a CPU; a test compares that count with PyTorch's own allocation events.
Exit code 1 where a trial is off by more than 2 %, or could not be predicted or run. A base that is not here and cannot
be made from what is here is left out, with its trials and the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from lora_lab.errors import LabError
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.predict.predictor import Unpredictable, predict
from lora_lab.schema.trial import Trial
from tests.benchmarks.memory_plot import write_plot
from tests.benchmarks.memory_trials import Case, cases
from tests.real_step import real_step
from tests.stepping import CPU

LIMIT_PERCENT = 2.0
_MEGABYTE = 1e6


class Bases:
    """The last base that was loaded, or why it could not be: trials that need the same one follow each other."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._key = ""
        self._found: LoadedBase | str = ""

    def of(self, trial: Trial) -> LoadedBase | str:
        """The base of `trial`, or the reason why there is none."""
        asked = trial.model_dump(mode="json", include={"model", "quantization"})
        key = json.dumps([asked, trial.training.precision])
        if key != self._key:
            self._key, self._found = key, ""
            gc.collect()
            self._found = self._load(trial)
        return self._found

    def _load(self, trial: Trial) -> LoadedBase | str:
        precision, quantization = trial.training.precision, trial.quantization
        try:
            return load_base(trial.model, precision=precision, quantization=quantization, device=CPU, cache=self._cache)
        except LabError as error:
            return f"{type(error).__name__}: {error}"


def results(chosen: Sequence[Case], cache: Path) -> Iterator[dict[str, Any]]:
    """One mapping per case: predicted and measured bytes, or `skipped` or `failed` with the reason."""
    bases = Bases(cache)
    ordered = sorted(((case.trial(), case) for case in chosen), key=_by_base)
    for trial, case in ordered:
        found: dict[str, Any] = {"model": case.model, "trial": case.name}
        base = bases.of(trial)
        if isinstance(base, str):
            yield {**found, "skipped": base}
            continue
        try:
            yield {**found, **_compared(trial, case, base, cache)}
        except Unpredictable as error:
            yield {**found, "failed": f"not predicted: {error}"}
        except LabError as error:
            yield {**found, "failed": f"{type(error).__name__}: {error}"}


def _by_base(one: tuple[Trial, Case]) -> tuple[str, str, str, str]:
    trial, case = one
    quantization = f"{trial.quantization.kind} {trial.quantization.double_quantization}"
    return case.model, trial.training.precision, quantization, str(trial.model.tie_embeddings)


def _compared(trial: Trial, case: Case, base: LoadedBase, cache: Path) -> dict[str, Any]:
    rows = case.rows()
    begin = time.perf_counter()
    predicted = predict(trial, rows, device_kind="cpu")
    between = time.perf_counter()
    measured = real_step(trial, rows, cache, base=base)
    end = time.perf_counter()
    return {
        "predicted_bytes": predicted.peak_allocated_bytes,
        "measured_bytes": measured.peak_bytes,
        "error_percent": 100 * (predicted.peak_allocated_bytes / measured.peak_bytes - 1),
        "predicted_at": predicted.place,
        "measured_at": str(measured.timeline.peak.place),
        "how": predicted.how,
        "predicted_parts": dict(predicted.parts),
        "measured_parts": dict(measured.timeline.peak.parts),
        "predict_seconds": between - begin,
        "measure_seconds": end - between,
    }


def summary_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors of the trials that have one; how many have none."""
    errors = [abs(one["error_percent"]) for one in found if "error_percent" in one]
    return {
        "trials": len(errors),
        "skipped": sum("skipped" in one for one in found),
        "failed": sum("failed" in one for one in found),
        "exact": sum(error == 0 for error in errors),
        "above_limit": sum(error > LIMIT_PERCENT for error in errors),
        "limit_percent": LIMIT_PERCENT,
        "median_absolute_error_percent": statistics.median(errors) if errors else None,
        "largest_absolute_error_percent": max(errors, default=None),
        "extrapolated": sum(one.get("how", "").startswith("from ") for one in found),
        "predict_seconds": sum(one.get("predict_seconds", 0.0) for one in found),
        "measure_seconds": sum(one.get("measure_seconds", 0.0) for one in found),
    }


def line_of(one: Mapping[str, Any]) -> str:
    """A row of the table: megabytes (1e6 bytes), error, seconds."""
    text = f"{one['model'][:18]:<18} {one['trial']:<104}"
    for key in ("skipped", "failed"):
        if key in one:
            return f"{text} {key}: {one[key]}"
    return (
        f"{text} {one['predicted_bytes'] / _MEGABYTE:9.2f} {one['measured_bytes'] / _MEGABYTE:9.2f} "
        f"{one['error_percent']:+8.3f} % {one['predict_seconds']:5.1f} {one['measure_seconds']:5.1f}"
    )


def told(summary: Mapping[str, Any]) -> list[str]:
    """The summary in words."""
    lines = [f"{summary['skipped']} trials skipped, {summary['failed']} failed"]
    if summary["trials"]:
        lines = [
            f"{summary['trials']} trials, {summary['extrapolated']} of them extrapolated from two depths: median "
            f"absolute error {summary['median_absolute_error_percent']:.3f} %, largest "
            f"{summary['largest_absolute_error_percent']:.3f} %, {summary['exact']} exact to the byte, "
            f"{summary['above_limit']} above {LIMIT_PERCENT:g} %",
            f"predicted in {summary['predict_seconds']:.0f} s, measured in {summary['measure_seconds']:.0f} s",
            *lines,
        ]
    return lines


def main() -> None:
    """Prints the table, writes the numbers and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about ten of the trials")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("lab/cache"), help="holds the converted model")
    parser.add_argument("--output", type=Path, default=Path("memory_measured.json"))
    parser.add_argument("--plot", type=Path, default=Path("memory_measured.html"))
    published = Path("memory_published.json")
    parser.add_argument("--published", type=Path, default=published, help="of memory_published, for the plot")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(f"{'model':<18} {'trial':<104} {'predicted':>9} {'measured':>9} {'error':>10} {'seconds of each':>11}")
    found = []
    for one in results(cases(quick=options.quick), options.cache):
        found.append(one)
        print(line_of(one), flush=True)
    summary = summary_of(found)
    result = {"quick": options.quick, "torch": torch.__version__, "summary": summary, "trials": found}
    options.output.write_text(json.dumps(result, indent=1, allow_nan=False))
    rows = json.loads(options.published.read_text())["rows"] if options.published.is_file() else []
    write_plot(found, rows, options.plot)
    print(*told(summary), sep="\n")
    if summary["above_limit"] or summary["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
