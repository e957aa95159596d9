"""What was predicted of a run's memory, kept beside what is measured."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_lab.data.encode import EncodedSet
from lora_lab.predict.predictor import Unpredictable, longest_rows, predict
from lora_lab.record.gathered import Gathered
from lora_lab.record.predicted_peak import FACT
from lora_lab.schema.trial import Trial

_PEAK = "predicted_peak_allocated_bytes"


def note_prediction(
    gathered: Gathered, trial: Trial, examples: EncodedSet, *, device: torch.device, cache: Path
) -> None:
    """Predicts a step on the run's own rows; where that cannot be done, says why. The run goes on either way."""
    try:
        found = predict(
            trial,
            longest_rows(examples, trial),
            device_kind="cuda" if device.type == "cuda" else "cpu",
            cache=cache,
        )
    except Unpredictable as error:
        gathered.missing[_PEAK] = error.reason
        return
    gathered.facts[FACT] = found.to_json()
    gathered.measurements[_PEAK] = found.peak_allocated_bytes
    if found.peak_reserved_bytes is not None:
        gathered.measurements["predicted_peak_reserved_bytes"] = found.peak_reserved_bytes
