"""Where the rows of a hub data set lie on this machine once `load_hub` has fetched them."""

from __future__ import annotations

import re
from pathlib import Path

import datasets

from lora_lab.data.hub import load_hub
from lora_lab.errors import IdentityError, Problem
from lora_lab.schema.data import HubData

_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_stored(data: HubData, *, cache: Path) -> Path:
    """Loads the rows as a run would, and returns the folder of Arrow files below `cache` that they were read from.

    Raises:
        DataError, MachineError, InputError: as `load_hub`.
        IdentityError: without a network `datasets` takes any revision that is in the cache; this one is not it.
    """
    load_hub(data, cache=cache)
    builder = datasets.load_dataset_builder(
        data.repo, name=data.config, revision=data.revision, cache_dir=str(cache / "datasets")
    )
    folder = Path(builder.cache_dir)
    is_pinned = _COMMIT.fullmatch(data.revision) and _COMMIT.fullmatch(folder.name)
    if is_pinned and folder.name != data.revision:
        raise IdentityError(Problem(data.repo, f"revision {folder.name} is in the cache, not {data.revision}"))
    return folder
