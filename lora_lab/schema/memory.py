"""Whose memory is predicted, for which device, and what becomes of a run that is predicted not to fit.

Housekeeping: a prediction changes no result, so none of it is in a fingerprint.
"""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from lora_lab.schema.section import Section


class Memory(Section):
    """style: whose training step `plan --memory` predicts; `own`, `hf` (transformers' Trainer), `litgpt`, or
    `litgpt_first`: with the longest row before all others, where lit-gpt of 2023 puts it. What a run is refused for,
    and what its result keeps, is always the lab's own step.

    on_overflow: of a run that is predicted not to fit: `refuse` it before a weight is read, or `try` it. device: a name
    or a size as `plan --device` takes (`plan.devices`); None is the device of the run.
    """

    style: Literal["own", "hf", "litgpt", "litgpt_first"]
    on_overflow: Literal["refuse", "try"]
    device: str | None

    @field_validator("device", mode="before")
    @classmethod
    def _as_text(cls, device: object) -> object:
        """YAML reads the name `4090` as a number."""
        if isinstance(device, int) and not isinstance(device, bool):
            return str(device)
        if device == "":
            raise ValueError('empty value (""); expected a device such as h100, a size such as 24GiB, or null')
        return device
