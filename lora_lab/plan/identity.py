"""What base and data a trial declares, as short texts that go into its fingerprint; known without loading weights.

An embedded model is its package, version and file hash; a hub repository its revision; a local folder or file the
SHA-256 of its content. The models and data floors verify the declaration when they load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_lab.errors import InputError, Problem
from lora_lab.plan.file_hashes import hash_file, hash_folder
from lora_lab.plan.paths import existing
from lora_lab.schema.data import Data, HubData, JsonlData
from lora_lab.schema.model import EmbeddedModel, FolderModel, HubModel, Model
from lora_lab.schema.trial import Trial

# The files of a model folder that decide what it computes and generates.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def identities_of(trial: Trial, *, cache: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Declared identities by role: `base`, `data`, `heldout` where it is a file of its own, and those of `extra`.

    Args:
        cache: folder that remembers hashes of local files (`identities.json`).
        extra: identities known elsewhere, such as hashes of evaluation texts; its keys must be others.

    Raises:
        InputError: for a local path that is missing, unreadable or no model folder.
    """
    own = {"base": base_identity(trial.model, cache=cache), **data_identities(trial.data, cache=cache)}
    taken = sorted(own.keys() & extra.keys())
    if taken:
        raise ValueError(f"extra may not replace {', '.join(taken)}")
    return own | dict(extra)


def base_identity(model: Model, *, cache: Path, needs_weights: bool = True) -> str:
    """The declared identity of a base model; of a random one only "random", since seed and shape are in the trial.

    needs_weights: whether a folder without any is refused; its memory can be planned from config.json alone.
    """
    if isinstance(model, EmbeddedModel):
        return f"{model.package} {model.package_version} {model.file} sha256:{model.sha256}"
    if isinstance(model, HubModel):
        return f"{model.repo}@{model.revision}"
    if isinstance(model, FolderModel):
        folder = existing(Path(model.path), where="model.path", kind="folder")
        existing(folder / "config.json", where="model.path", kind="file")
        if needs_weights and not any(folder.glob("*.safetensors")):
            raise InputError(Problem("model.path", f'"{folder}" has no *.safetensors file; no other format is loaded'))
        return f"sha256:{hash_folder(folder, MODEL_FILES, where='model.path', cache=cache)}"
    return "random"


def data_identities(data: Data, *, cache: Path) -> dict[str, str]:
    """Identities by role: `data`, and `heldout` where it is a file of its own; raises as `identities_of`."""
    if isinstance(data, HubData):
        return {"data": f"{data.repo}@{data.revision}"}
    if isinstance(data, JsonlData):
        identities = {"data": f"sha256:{hash_file(data.path, where='data.path', cache=cache)}"}
        if data.heldout_path is not None:
            digest = hash_file(data.heldout_path, where="data.heldout_path", cache=cache)
            identities["heldout"] = f"sha256:{digest}"
        return identities
    return {"data": f"reasoning-gym {data.package_version}"}
