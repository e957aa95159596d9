"""Where it is kept that tree and lm-eval agree: once per base, kind of adapter, evaluation and library versions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lab.plan.identity import base_identity
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.trial import Trial

_LIBRARIES = ("torch", "transformers", "peft", "lm_eval", "lora-lab")


@dataclass(frozen=True, slots=True)
class GuardNote:
    """about: all that the verdict depends on; its files in `folder` are named by a hash of it."""

    folder: Path
    about: dict[str, Any]

    def path(self, kind: str) -> Path:
        """The file for requests of this kind (`loglikelihood`, `loglikelihood_rolling`)."""
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}-{kind}.json"


def guard_note(trial: Trial, *, device: str, cache: Path) -> GuardNote:
    """The note of all trials with this base and kind of adapter; trained weights are no part of it."""
    base = {
        "identity": base_identity(trial.model, cache=cache),
        "model": trial.model.model_dump(mode="json", exclude={"name", "path"}),
        "init_from": trial.init_from,
        "init_as": trial.init_as,
        "precision": trial.training.precision,
        "quantization": trial.quantization.model_dump(mode="json"),
    }
    return note_of(base, trial.method.kind, trial.evaluation, device=device, cache=cache)


def note_of(base: object, adapter: str, evaluation: Evaluation, *, device: str, cache: Path) -> GuardNote:
    """The note of a base, known by any JSON value, with adapters of a kind, scored in this way."""
    about = {
        "base": base,
        "adapter": adapter,
        "evaluation": evaluation.model_dump(mode="json", exclude={"mirror", "include_path"}),
        "device": device,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return GuardNote(cache / "guards", about)
