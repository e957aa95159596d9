"""Weights of a model that training has changed, apart from the rest: `changed.safetensors` and what it belongs to.

For methods that train some of a model's own weights: the base is on the machine already, so only what differs is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.record.atomic import read_json, write_json
from lora_lab.record.whole_folder import looks_like, write_whole_folder

CHANGED_FILE = "changed.safetensors"
ABOUT_FILE = "changed.json"
_VERSION = 1


def save_changed(model: Any, names: Sequence[str], folder: Path, *, identity: str) -> int:
    """Writes the parameters `names` of `model`, complete or not at all, and returns the bytes on disk.

    identity: of the base they belong to, as the ledger declares it. A weight that two modules share (tied embeddings)
    has one name.

    Raises:
        InputError: the folder is there already, or a weight is not finite.
        MachineError: the disk refuses.
    """
    if folder.exists():
        raise InputError(Problem(str(folder), "exists already and is not overwritten"))
    parameters = dict(model.named_parameters())
    tensors = {name: parameters[name].detach().contiguous() for name in names}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(Problem(str(folder), f"not saved: {len(broken)} of {len(tensors)} tensors hold NaN or Inf"))

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / CHANGED_FILE, metadata={"format": "pt"})
        write_json(temporary / ABOUT_FILE, {"version": _VERSION, "base": identity, "tensors": sorted(tensors)})

    try:
        write_whole_folder(folder, write)
    except SafetensorError as error:
        raise MachineError(Problem(str(folder), f"cannot be written: {error}")) from error
    return sum(file.stat().st_size for file in folder.iterdir())


def load_changed(model: Any, folder: Path, *, identity: str) -> None:
    """Puts the weights of `folder` into `model`, a base of this identity.

    Raises:
        InputError: with every problem: files missing or damaged, another base, tensors that have no place of their size
            or are not finite. The model is then left as it was.
    """
    about, tensors = _read(folder)
    parameters = dict(model.named_parameters())
    problems = []
    if about.get("base") != identity:
        problems.append(f"belongs to another base ({about.get('base')}), this is {identity}")
    if sorted(tensors) != about.get("tensors"):
        problems.append(f"{CHANGED_FILE} does not hold the tensors that {ABOUT_FILE} names")
    unknown = [name for name in tensors if name not in parameters]
    if unknown:
        problems.append(f"{len(unknown)} tensors the model has no place for: {', '.join(unknown[:3])}")
    wrong = [name for name, one in tensors.items() if name in parameters and one.shape != parameters[name].shape]
    if wrong:
        sizes = f"{tuple(tensors[wrong[0]].shape)}, the model needs {tuple(parameters[wrong[0]].shape)}"
        problems.append(f"{len(wrong)} tensors of another size: {wrong[0]} is {sizes}")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        problems.append(f"{len(broken)} of {len(tensors)} tensors hold NaN or Inf: {', '.join(broken[:3])}")
    if problems:
        raise InputError([Problem(str(folder), problem) for problem in problems])
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    missing = [
        Problem(str(folder / name), "not found") for name in (CHANGED_FILE, ABOUT_FILE) if not (folder / name).is_file()
    ]
    if missing:
        raise InputError(missing)
    try:
        about, tensors = read_json(folder / ABOUT_FILE), load_file(folder / CHANGED_FILE)
    except (SafetensorError, OSError) as error:
        reason = looks_like(folder / CHANGED_FILE) or error
        raise InputError(Problem(str(folder / CHANGED_FILE), f"not a safetensors file: {reason}")) from None
    if not isinstance(about, dict) or about.get("version") != _VERSION:
        raise InputError(Problem(str(folder / ABOUT_FILE), f"expected version {_VERSION} of this file"))
    return about, tensors
