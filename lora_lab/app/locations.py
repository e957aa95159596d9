"""Where `conf/` and `sweeps/` are: inside an installed wheel, or beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

import lora_lab

_PACKAGE = Path(lora_lab.__file__).resolve().parent


def _beside(name: str) -> Path:
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def conf_folder() -> Path:
    """The folder of the configuration groups."""
    return _beside("conf")


def sweep_folders() -> list[Path]:
    """Folders of study files: the current folder's `sweeps/` first, then the lab's own."""
    own = _beside("sweeps")
    here = Path.cwd() / "sweeps"
    return [here, own] if here.is_dir() and here.resolve() != own.resolve() else [own]
