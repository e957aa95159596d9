"""Methods that train weights of the model itself, or none."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from lora_lab.schema.method_section import MethodSection
from lora_lab.schema.section import Count, Names, Natural, Positive, Share, as_tuple


class Base(MethodSection):
    """Nothing is trained: row zero of a study."""

    trains = "nothing"
    saves = "nothing"
    kind: Literal["base"]


class Full(MethodSection):
    """Every weight is trained."""

    trains = "weights"
    saves = "model"
    kind: Literal["full"]


class Freeze(MethodSection):
    """The last `last_layers` decoder layers and the named modules are trained, the rest stays frozen."""

    trains = "weights"
    saves = "changed"
    kind: Literal["freeze"]
    last_layers: Natural
    modules: Names

    @model_validator(mode="after")
    def _something_is_trained(self) -> Freeze:
        if not self.last_layers and not self.modules:
            raise ValueError("nothing would be trained; expected last_layers >= 1 or names in modules")
        return self


class Lisa(MethodSection):
    """Layerwise importance sampled AdamW (Pan et al. 2024, arXiv 2403.17919).

    layers: gamma, the middle layers that are trained at a time. interval: K, optimizer steps between two draws.
    probabilities: `uniform` draws exactly gamma layers; `list` draws each layer by its own entry of `weights`;
    `from_norm_log` makes these entries from two logs of layer norms (`norm_log`: runs of the ledger, full and LoRA).
    """

    trains = "weights"
    saves = "changed"
    kind: Literal["lisa"]
    layers: Natural
    interval: Count
    probabilities: Literal["uniform", "list", "from_norm_log"]
    weights: Annotated[tuple[Share, ...], BeforeValidator(as_tuple)]
    norm_log: Names

    @model_validator(mode="after")
    def _list_is_given(self) -> Lisa:
        if (self.probabilities == "list") != bool(self.weights):
            raise ValueError("weights (a probability per layer) goes with probabilities=list, and only with it")
        if (self.probabilities == "from_norm_log") != (len(self.norm_log) == 2):
            raise ValueError(
                "norm_log (two runs: one of full fine-tuning, one of LoRA) goes with probabilities=from_norm_log"
            )
        return self


class Galore(MethodSection):
    """Gradient low-rank projection (Zhao et al. 2024, arXiv 2403.03507). `rank` and `target`: what is projected, and to
    how many dimensions; all other weights are trained as they are."""

    trains = "weights"
    saves = "model"
    uses = frozenset({"rank", "target"})
    kind: Literal["galore"]
    update_gap: Count
    scale: Positive
    side: Literal["std", "reverse_std", "left", "right", "full"]
