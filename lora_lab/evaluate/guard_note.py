"""Where it is kept that tree and lm-eval agree: once per base, kind of adapter, evaluation and library versions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lab.plan.identity import base_identity
from lora_lab.schema.trial import Trial

_LIBRARIES = ("torch", "transformers", "peft", "lm_eval", "lora-lab")
_LABELS = {"model": {"name", "path"}, "evaluation": {"mirror", "include_path"}}


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
    about = {
        "base": base_identity(trial.model, cache=cache),
        "init_from": trial.init_from,
        "init_as": trial.init_as,
        "precision": trial.training.precision,
        "quantization": trial.quantization.model_dump(mode="json"),
        "method": trial.method.kind,
        "device": device,
        "libraries": {name: version(name) for name in _LIBRARIES},
    } | {name: getattr(trial, name).model_dump(mode="json", exclude=labels) for name, labels in _LABELS.items()}
    return GuardNote(cache / "guards", about)
