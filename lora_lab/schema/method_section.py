"""What every method says about itself, beside its settings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from lora_lab.schema.section import Positive, Section, as_tuple

LORA_AXES = frozenset({"rank", "alpha", "dropout", "target"})

# One entry per group of layers, lowest first, as many groups as entries.
Factors = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)]


class MethodSection(Section):
    """trains: an adapter, weights of the model itself, or nothing. uses: the top-level axes that mean something to the
    method (`rank`, `alpha`, `dropout`, `target`); the others are no part of its trials. saves: an adapter in
    PEFT's format, the whole model, or those of its weights that were changed."""

    trains: ClassVar[Literal["nothing", "adapter", "weights"]] = "adapter"
    saves: ClassVar[Literal["nothing", "adapter", "model", "changed"]] = "adapter"
    uses: ClassVar[frozenset[str]] = frozenset()

    @property
    def has_adapter(self) -> bool:
        """Whether something is added to the base, which itself stays as it is."""
        return self.trains == "adapter"
