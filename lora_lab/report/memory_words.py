"""What is said of predicted memory: beside the measured peak of a run, over many runs, and how a peak was predicted."""

from __future__ import annotations

from lora_lab.plan.prediction import Prediction
from lora_lab.record.cohort_facts import why_missing
from lora_lab.record.predicted_peak import PEAK, TRAINED, peaks_of
from lora_lab.record.result import Result
from lora_lab.report.text import bytes_text, clean
from lora_lab.study.predicted_memory import PredictedMemory

_STYLES = {
    "own": "the step of this lab",
    "hf": "the step of Hugging Face's trainer",
    "litgpt": "the step of LitGPT",
    "litgpt_first": "the step of LitGPT, its longest row first",
}
_KINDS = {"cpu": "bytes of live tensors", "cuda": "bytes as CUDA's allocator counts them"}


def part_title(part: str) -> str:
    """A part's name as it is shown."""
    return part.replace("_", " ")


def percent_text(fraction: float) -> str:
    """`+0.8 %`, with a second decimal below 0.1 %; the sign is left out of a difference that rounds to nothing."""
    percent = 100 * fraction
    text = f"{percent:+.1f}" if abs(percent) >= 0.0995 else f"{percent:+.2f}"
    return f"{'0.00' if float(text) == 0 else text} %"


def peak_sentence(result: Result) -> str | None:
    """`predicted 1.02 GB, measured 1.01 GB, +0.8 %`; None where nothing was predicted."""
    predicted, peaks = result.predicted_peak_allocated_bytes, peaks_of(result)
    if predicted is None:
        return None
    told = f"predicted {bytes_text(predicted)}"
    if peaks is not None:
        return f"{told}, measured {bytes_text(peaks.measured)}, {percent_text(peaks.error)}"
    if PEAK in result.measurements:
        why = "it is not the run's own" if result.status in TRAINED else f"the run ended {result.status}"
        return f"{told}; measured {bytes_text(result.measurements[PEAK])}, which cannot be compared: {why}"
    return f"{told}; not measured: {clean(why_missing(result, PEAK))}"


def error_sentence(predicted: PredictedMemory) -> str | None:
    """Over how many runs, and how far off: median and largest error; None where no run has both numbers."""
    largest = predicted.largest
    if largest is None or predicted.median_error is None:
        return None
    count, without = len(predicted.pairs), predicted.without
    at = f"{percent_text(largest.peaks.error)} ({clean(largest.name)})"
    if count == 1:
        told = f"In the one run that has a predicted and a measured peak, the error is {at}"
    else:
        told = (
            f"Over {count} runs that have a predicted and a measured peak, the median absolute error is "
            f"{100 * predicted.median_error:.2f} %, the largest error {at}"
        )
    others = f"{without} other trained run{' lacks' if without == 1 else 's lack'}"
    return told + (f"; {others} one of the two." if without else ".")


def prediction_sentence(prediction: Prediction) -> str:
    """The peak, where in the step it is, and its largest parts."""
    parts = sorted(((size, name) for name, size in prediction.parts.items() if size), reverse=True)
    told = ", ".join(f"{part_title(name)} {bytes_text(size)}" for size, name in parts)
    return (
        f"Predicted peak: {bytes_text(prediction.peak_allocated_bytes)} allocated, in {prediction.place}. Of it {told}."
    )


def prediction_facts(prediction: Prediction) -> list[tuple[str, str]]:
    """How the peak was predicted, as name and text."""
    paged, reserved = prediction.paged_bytes, prediction.peak_reserved_bytes
    return [
        ("counted", _KINDS[prediction.device_kind]),
        ("step", _STYLES[prediction.style]),
        *([] if reserved is None else [("reserved at the peak", bytes_text(reserved))]),
        *([("in managed memory, beside the peak", bytes_text(paged))] if paged else []),
        ("base, shared by runs on it", bytes_text(prediction.base_bytes)),
        ("trainable parameters", f"{prediction.trainable_parameters:,}"),
        ("all parameters", f"{prediction.total_parameters:,}"),
        ("rows of a micro-batch", f"{prediction.micro_batch_size:,}"),
        ("tokens of the longest row", f"{prediction.longest_row:,}"),
        ("rows", clean(prediction.rows)),
        ("how", clean(prediction.how)),
    ]
