"""Methods that train an adapter beside a frozen base: the LoRA family, vectors, virtual tokens, bottlenecks."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from lora_lab.schema.method_section import LORA_AXES, Factors, MethodSection
from lora_lab.schema.section import Count, Fraction, NonNegative, Positive, Text, as_tuple


class Lora(MethodSection):
    """Low-rank adapters by PEFT.

    lora: scaling alpha / rank (Hu et al. 2021); rslora: alpha / sqrt(rank) (Kalajdzievski 2023); dora: lora on the
    direction plus a trained magnitude per output (Liu et al. 2024); pissa and olora: lora that starts from the base's
    principal singular vectors (Meng et al. 2024) or from its QR decomposition (Buyukakyuz 2024).

    rank_factors: rank of a group of layers as a multiple of `rank`, lowest layers first, alpha alike, so that the
    scaling is the same in all layers (for rslora it grows with the root of the factor); as many groups as entries.
    Empty: one rank for all.
    """

    uses = LORA_AXES
    kind: Literal["lora", "rslora", "dora", "pissa", "olora"]
    rank_factors: Factors


class LoraPlus(MethodSection):
    """LoRA whose B is trained at `ratio` times the learning rate of A (Hayou et al. 2024, arXiv 2402.12354)."""

    uses = LORA_AXES
    kind: Literal["lora_plus"]
    ratio: Positive
    rank_factors: Factors


class AdaLora(MethodSection):
    """Adaptive budget (Zhang et al. 2023, arXiv 2303.10512): P diag(E) Q with pruned singular values.

    `rank` is the target, the mean rank at the end; every matrix starts with `initial_rank`, or where
    that is null with `initial_factor` x rank, rounded up. The budget shrinks between
    the first `initial_share` and the last `final_share` of the steps, every `interval` steps. orthogonality_weight: of
    the penalty that keeps P and Q orthogonal.
    """

    uses = LORA_AXES
    kind: Literal["adalora"]
    initial_rank: Count | None
    initial_factor: Positive
    initial_share: Fraction
    final_share: Fraction
    interval: Count
    importance_betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(as_tuple)]
    orthogonality_weight: NonNegative

    @model_validator(mode="after")
    def _time_to_shrink(self) -> AdaLora:
        if self.initial_share + self.final_share >= 1:
            raise ValueError(
                f"initial_share ({self.initial_share}) and final_share ({self.final_share}) leave no steps in which "
                "the budget could shrink; their sum must be < 1"
            )
        return self

    def start(self, rank: int) -> int:
        """The rank of every matrix at the start of a trial of this rank."""
        return math.ceil(self.initial_factor * rank) if self.initial_rank is None else self.initial_rank


class Ia3(MethodSection):
    """IA3 (Liu et al. 2022, arXiv 2205.05638) by PEFT: learned vectors scale keys, values and MLP activations."""

    uses = frozenset({"target"})
    kind: Literal["ia3"]


class PromptTuning(MethodSection):
    """Trained embeddings in front of the input (Lester et al. 2021, arXiv 2104.08691) by PEFT."""

    kind: Literal["prompt_tuning"]
    virtual_tokens: Count
    init: Literal["random", "vocabulary", "text"]
    init_text: Text | None

    @model_validator(mode="after")
    def _text_is_given(self) -> PromptTuning:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init_text goes with init=text, and only with it")
        return self


class PTuning(MethodSection):
    """Virtual tokens made by a small trained encoder (Liu et al. 2021, arXiv 2103.10385) by PEFT."""

    kind: Literal["p_tuning"]
    virtual_tokens: Count
    encoder: Literal["mlp", "lstm"]
    encoder_hidden_size: Count
    encoder_layers: Count


class PrefixTuning(MethodSection):
    """Trained keys and values in front of every layer's own (Li & Liang 2021, arXiv 2101.00190) by PEFT.

    projection: they are made by an MLP of `encoder_hidden_size` while they are trained.
    """

    kind: Literal["prefix_tuning"]
    virtual_tokens: Count
    projection: bool
    encoder_hidden_size: Count


class Bottleneck(MethodSection):
    """Bottleneck adapters: two per block (Houlsby et al. 2019), one (Pfeiffer et al. 2021), or one beside the MLP
    (parallel, He et al. 2022). The bottleneck has hidden size / reduction_factor units."""

    uses = frozenset({"dropout"})
    kind: Literal["bottleneck"]
    style: Literal["houlsby", "pfeiffer", "parallel"]
    reduction_factor: Count
    activation: Literal["relu", "gelu", "silu", "tanh"]
    scaling: Positive
