"""Same settings, same fingerprint, one training.

The fingerprint covers every value that can change a result, the declared identity of base, data and evaluation text,
and a numerics version. Labels and paths are left out (a file is known by its hash), and so are values that the method
does not use: `method=full rank=4` and `method=full rank=8` are one trial.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lora_lab.schema.trial import Trial

# Raised by one whenever a change to the code may change a number that a trial leads to.
NUMERICS_VERSION = 1

_AXES = ("rank", "alpha", "dropout", "target")
_TRAINING_ONLY = ("learning_rate", "optimizer", "scheduler", "seed", "seeds", "init_as")
_LABELS_AND_PATHS = {
    "model": ("name", "path", "shape"),
    "data": ("name", "path", "heldout_path"),
    "evaluation": ("mirror", "include_path"),
}


def canonical(trial: Trial, identities: Mapping[str, str]) -> dict[str, Any]:
    """The mapping that is hashed: `trial` without what cannot change its result."""
    content = trial.model_dump(mode="json")
    for section, keys in _LABELS_AND_PATHS.items():
        content[section] = {key: value for key, value in content[section].items() if key not in keys}
    if trial.model.kind == "random":
        content["model"]["shape"] = trial.model.shape.model_dump(mode="json")
    unused = [axis for axis in _AXES if axis not in trial.method.uses]
    # The runs a trial is built on are known by their fingerprints, which are among the identities.
    unused += ["init_from"] + (["init_as"] if trial.init_from is None else [])
    if trial.method.kind == "lisa":
        content["method"]["norm_log"] = []
    content = {key: value for key, value in content.items() if key not in unused}
    if trial.method.kind == "base":
        content = {key: value for key, value in content.items() if key not in _TRAINING_ONLY}
        content["training"] = {"precision": trial.training.precision}
        content["data"] = {key: value for key, value in content["data"].items() if not key.startswith("train_")}
    content["seed"] = None  # the four parts in `seeds` say all
    return {"trial": content, "identities": dict(identities), "numerics_version": NUMERICS_VERSION}


def fingerprint(trial: Trial, identities: Mapping[str, str]) -> str:
    """SHA-256 (hex) of the canonical trial."""
    return _digest(canonical(trial, identities))


def setting_fingerprint(trial: Trial, identities: Mapping[str, str]) -> str:
    """Like `fingerprint` without the seeds: equal for the trials whose results are averaged."""
    content = canonical(trial, identities)
    content["trial"].pop("seeds", None)
    return _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
