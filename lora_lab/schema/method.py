"""The methods by name: one union, one table. The settings of each stand in its family's file."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from lora_lab.schema.adapter_methods import (
    AdaLora,
    Bottleneck,
    Ia3,
    Lora,
    LoraPlus,
    PrefixTuning,
    PromptTuning,
    PTuning,
)
from lora_lab.schema.expert_methods import Loramoe, Mola, Molora, Mov
from lora_lab.schema.method_section import MethodSection
from lora_lab.schema.weight_methods import Base, Freeze, Full, Galore, Lisa

Method = Annotated[
    Base
    | Full
    | Freeze
    | Lisa
    | Galore
    | Lora
    | LoraPlus
    | AdaLora
    | Ia3
    | PromptTuning
    | PTuning
    | PrefixTuning
    | Bottleneck
    | Mov
    | Molora
    | Loramoe
    | Mola,
    Field(discriminator="kind"),
]
# kind -> its class, in the order in which they are printed.
METHODS: dict[str, type[MethodSection]] = {
    kind: one for one in get_args(get_args(Method)[0]) for kind in get_args(one.model_fields["kind"].annotation)
}
# Scaled at the input of the MLP's last linear layer instead of in all of the MLP's layers.
VECTOR_KINDS = ("ia3", "mov")
# They put virtual tokens in front of the row.
PROMPT_KINDS = ("prompt_tuning", "p_tuning", "prefix_tuning")
# They mix experts by a router.
ROUTED_KINDS = ("mov", "molora", "loramoe", "mola")
# Many of them can be trained at once on one frozen base, each on rows of its own (plan/cohorts.py).
FUSED_KINDS = ("lora", "rslora", "lora_plus", "pissa", "olora", "dora", "ia3", "molora", "loramoe", "mola")
