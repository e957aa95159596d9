"""A study at one scale, as its folder, its table and its page show it."""

from __future__ import annotations

from lora_lab.schema.claims import Scale
from lora_lab.schema.design import Design
from lora_lab.schema.study import Study

_PUBLISHED = ".published"


def folder_name(name: str, scale: Scale) -> str:
    """The study's folder under ROOT/studies."""
    return name if scale == "pocket" else f"{name}{_PUBLISHED}"


def file_name(folder: str, scale: Scale) -> str:
    """The study's file, without its ending, by its folder's name."""
    return folder if scale == "pocket" else folder.removesuffix(_PUBLISHED)


def reproduce_command(folder: str, scale: Scale) -> str:
    """How a study is run at a scale. folder: its folder's name, or that of its file."""
    flag = "" if scale == "pocket" else f" --scale {scale}"
    return f"lora-lab reproduce {file_name(folder, scale)}{flag}"


def shown_study(study: Study, scale: Scale) -> Study:
    """The study with the design of a scale at its top level; the published one has a name of its own.

    Raises:
        InputError: the study has no such scale.
    """
    if scale == "pocket":
        return study
    design = study.design(scale)
    fields = {field: getattr(design, field) for field in Design.model_fields}
    return study.model_copy(update={**fields, "name": folder_name(study.name, scale)})
