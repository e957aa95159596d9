"""Where the rows of a hub data set lie on this machine once `load_hub` has fetched them."""

from __future__ import annotations

from pathlib import Path

import datasets

from lora_lab.data.hub import load_hub
from lora_lab.schema.data import HubData


def load_stored(data: HubData, *, cache: Path) -> Path:
    """Loads the rows as a run would, and returns the folder of Arrow files below `cache` that they were read from.

    Raises:
        DataError, MachineError, InputError, IdentityError: as `load_hub`.
    """
    load_hub(data, cache=cache)
    builder = datasets.load_dataset_builder(
        data.repo, name=data.config, revision=data.revision, cache_dir=str(cache / "datasets")
    )
    return Path(builder.cache_dir)
