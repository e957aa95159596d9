"""Where and on what a method works: the quantization of the frozen base, and the modules that get an adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lora_lab.schema.section import Names, Section

QuantizationKind = Literal["none", "nf4", "fp4", "int8"]

# The parts a target may name, in the order in which they are printed.
PARTS = ("query", "key", "value", "projection", "mlp", "head", "embedding")


class Quantization(Section):
    """Storage of the frozen linear layers by bitsandbytes, the head not among them.

    nf4, fp4: 4 bits and a scale per block of 64 weights (QLoRA, Dettmers et al. 2023); double_quantization: these
    scales in 8 bits. int8: 8 bits and a scale per output, products by LLM.int8 (Dettmers et al. 2022).
    """

    kind: QuantizationKind
    double_quantization: bool

    @model_validator(mode="after")
    def _double_needs_a_kind(self) -> Quantization:
        if self.kind == "none" and self.double_quantization:
            raise ValueError("double_quantization=true needs quantization=nf4 or quantization=fp4")
        if self.kind == "int8" and self.double_quantization:
            raise ValueError(
                "int8 has one scale per output and no scales of blocks that could be quantized again; "
                "double_quantization=true needs quantization=nf4 or quantization=fp4"
            )
        return self


class Target(Section):
    """The modules that get an adapter: parts by name, and exact module names (`q_proj`) for what no part covers."""

    query: bool
    key: bool
    value: bool
    projection: bool
    mlp: bool
    head: bool
    embedding: bool
    modules: Names

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the chosen parts, in the order of `PARTS`."""
        return tuple(part for part in PARTS if getattr(self, part))
