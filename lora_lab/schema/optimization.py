"""How weights move: optimizer, learning-rate schedule, batch sizes, precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_lab.schema.method_section import Factors
from lora_lab.schema.section import Count, Fraction, Natural, NonNegative, Pair, Positive, Section

AdamKind = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]


class Adam(Section):
    """AdamW (Loshchilov & Hutter 2019), in torch or with bitsandbytes' 8-bit and paged states."""

    kind: AdamKind
    weight_decay: NonNegative
    betas: Pair
    eps: Positive


class Sgd(Section):
    """Stochastic gradient descent with optional (Nesterov) momentum; weight decay is added to the gradient."""

    kind: Literal["sgd"]
    weight_decay: NonNegative
    momentum: Fraction
    nesterov: bool

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs momentum > 0")
        return self


class Lion(Section):
    """Sign of an interpolated momentum (Chen et al. 2023), decoupled weight decay."""

    kind: Literal["lion"]
    weight_decay: NonNegative
    betas: Pair


class Sophia(Section):
    """Sophia-G (Liu et al. 2023, arXiv 2305.14342): momentum over a clipped diagonal Gauss-Newton estimate.

    rho: the update is clipped where momentum exceeds rho x estimate. estimate_interval: steps between two estimates.
    """

    kind: Literal["sophia"]
    weight_decay: NonNegative
    betas: Pair
    rho: Positive
    estimate_interval: Count


Optimizer = Annotated[Adam | Sgd | Lion | Sophia, Field(discriminator="kind")]


class _Warmup(Section):
    """Exactly one of the two says how long the rate rises linearly to its peak, from 0 (wsd: from its floor)."""

    warmup_steps: Natural | None
    warmup_ratio: Fraction | None

    @model_validator(mode="after")
    def _one_of_two(self) -> _Warmup:
        if (self.warmup_steps is None) == (self.warmup_ratio is None):
            raise ValueError(
                f"set exactly one of warmup_steps (now {self.warmup_steps}) and warmup_ratio "
                f"(now {self.warmup_ratio}); give null for the other"
            )
        return self


class Constant(_Warmup):
    """The peak rate throughout."""

    kind: Literal["constant"]


class Linear(_Warmup):
    """From the peak to 0 at the last step."""

    kind: Literal["linear"]


class Cosine(_Warmup):
    """`cycles` periods of a cosine from the peak to `floor` times the peak; 0.5 is the half-cycle variant."""

    kind: Literal["cosine"]
    cycles: Positive
    floor: Fraction


class Wsd(_Warmup):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): the last `decay_ratio` of the steps fall to `floor`."""

    kind: Literal["wsd"]
    decay_ratio: Fraction
    floor: Fraction


Scheduler = Annotated[Constant | Linear | Cosine | Wsd, Field(discriminator="kind")]


class Training(Section):
    """Length, batch, precision and memory settings of training. A step is always an optimizer step.

    layer_rates: factors on the learning rate by group of decoder layers, lowest first; empty: one rate for all. What
    lies in no layer (embedding, head, final norm) keeps the rate itself.
    """

    epochs: Count | None
    max_steps: Count | None
    batch_size: Count
    micro_batch_size: Count
    max_gradient_norm: Positive | None
    gradient_checkpointing: Literal["off", "every_layer", "sqrt"] | Count
    precision: Literal["fp32", "bf16", "fp64"]
    bucket_batches: Count
    layer_rates: Factors

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"set exactly one of epochs (now {self.epochs}) and max_steps (now {self.max_steps}); "
                "give null for the other, as in training.max_steps=null"
            )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by micro_batch_size={self.micro_batch_size}"
            )
        return self
