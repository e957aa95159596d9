"""Whether runs are copied to W&B. The ledger is written in any case; a copy changes no result."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lora_lab.schema.section import Section

_NAME_LIMIT = 128
_FORBIDDEN = re.compile(r"[/\\#?%:\s\x00-\x1f]")


class TrackingOff(Section):
    """The ledger only."""

    kind: Literal["off"]


class WandbTracking(Section):
    """A W&B run for every run. mode: `offline` writes folders below ROOT/wandb, which `wandb sync` sends later;
    `online` sends while training goes on. entity: a user or team, null for the account's default."""

    kind: Literal["wandb"]
    mode: Literal["offline", "online"]
    project: str
    entity: str | None

    @field_validator("project", "entity")
    @classmethod
    def _is_name(cls, name: str | None) -> str | None:
        return name if name is None else check_wandb_name(name)


Tracking = Annotated[TrackingOff | WandbTracking, Field(discriminator="kind")]


def check_wandb_name(name: str) -> str:
    """The name itself; raises ValueError where W&B would refuse it as the name of a project or entity."""
    if not name or len(name) > _NAME_LIMIT or _FORBIDDEN.search(name):
        raise ValueError(f'expected 1 to {_NAME_LIMIT} characters without spaces or / \\ # ? % :, got "{name[:100]}"')
    return name
