"""Methods that mix experts by a router: vectors, or LoRA pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from lora_lab.schema.method_section import LORA_AXES, MethodSection
from lora_lab.schema.section import Count, NonNegative, Share, Text, as_tuple


def _some(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values:
        raise ValueError("expected at least one entry, got an empty list")
    return values


Counts = Annotated[tuple[Count, ...], BeforeValidator(as_tuple), AfterValidator(_some)]


class Mov(MethodSection):
    """Mixture of vectors (Zadouri et al. 2023, arXiv 2309.05444): `experts` IA3 vectors per site, merged per token."""

    uses = frozenset({"target"})
    kind: Literal["mov"]
    experts: Count
    router_input: Literal["site_input", "site_output"]


class Molora(MethodSection):
    """Mixture of LoRA (Zadouri et al. 2023): `experts` LoRA pairs per matrix, all mixed by a softmax router."""

    uses = LORA_AXES
    kind: Literal["molora"]
    experts: Count


class Loramoe(MethodSection):
    """LoRAMoE (Dou et al. 2023, arXiv 2312.09979): dense experts on the MLP's linear layers, in two groups.

    groups: the types of rows (`data.types`, `data.type_column`) that the first and the second half of the experts are
    for. delta, beta: strength and weight of the localized balancing constraint; beta=0 leaves it out, as the released
    script does. balance: `variance_over_mean` is the paper's form, `variance_over_squared_mean` the released code's.

    The constraint balances (importance) x (1 + delta for the group of a row's own type, 1 - delta for the other), so it
    is smallest where the own group gets (1 - delta) / 2 of a row's weight: it turns rows away from the group of their
    type, where the paper says that it draws them there. Training on rows of two types ends at that share, with the
    paper's 0.1 and 0.1 as well, and without the constraint (beta=0) neither type prefers a group.
    """

    uses = LORA_AXES
    kind: Literal["loramoe"]
    experts: Count
    groups: Annotated[tuple[Text, Text], BeforeValidator(as_tuple)]
    delta: Share
    beta: NonNegative
    balance: Literal["variance_over_mean", "variance_over_squared_mean"]

    @model_validator(mode="after")
    def _two_groups(self) -> Loramoe:
        if self.experts % 2:
            raise ValueError(f"experts={self.experts} cannot be cut into two groups of equal size; use an even number")
        if self.groups[0] == self.groups[1]:
            raise ValueError(f'groups names "{self.groups[0]}" twice; expected two different types of rows')
        return self


class Mola(MethodSection):
    """MoLA (Gao et al. 2024, arXiv 2402.08562): LoRA experts with token-level top-k routing, as many as the group of
    layers has. experts: one entry per group of layers, lowest first. balance_weight: of the load-balancing loss."""

    uses = LORA_AXES
    kind: Literal["mola"]
    experts: Counts
    top_k: Count
    balance_weight: NonNegative

    @model_validator(mode="after")
    def _enough_experts(self) -> Mola:
        if self.top_k > min(self.experts):
            raise ValueError(f"top_k={self.top_k} is more than the {min(self.experts)} experts of a layer")
        return self
