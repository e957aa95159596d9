"""Bytes of quantized weights as bitsandbytes stores them.

4 bits (QLoRA, Dettmers et al. 2023, section 3): two weights to a byte; one fp32 constant (absmax) per block of 64
weights, which is 4.5 bits per parameter. Double quantization stores that constant in 8 bits, with an fp32 constant per
block of 256 constants and one fp32 offset per tensor: 4 + 8/64 + 32/(64 x 256) = 4.127 bits. Every tensor also carries
its code books: 16 fp32 values, and 256 more for the 8-bit constants.

8 bits (LLM.int8, Dettmers et al. 2022): one byte per weight and one fp32 constant per output, 8 + 32/inputs bits.
Outliers take no storage: their columns are found and dequantized within each product (4 bytes x outputs x columns,
beside one int8 copy of its input), and gone after it.

Head, embeddings, norms and biases are not quantized and not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lora_lab.plan.shapes import Module, modules_of
from lora_lab.schema.adaptation import Quantization
from lora_lab.schema.model import Shape

BLOCK_WEIGHTS = 64
NESTED_BLOCK_CONSTANTS = 256
_FP32_BYTES = 4
_CODE_BOOK_BYTES = 16 * _FP32_BYTES
_NESTED_CODE_BOOK_BYTES = 256 * _FP32_BYTES


@dataclass(frozen=True, slots=True)
class QuantizedBytes:
    """Storage of quantized weights. parameters: how many weights; the three byte counts add up to `total_bytes`."""

    parameters: int
    packed_bytes: int
    constant_bytes: int
    code_book_bytes: int

    @property
    def total_bytes(self) -> int:
        """All that stays in memory for these weights."""
        return self.packed_bytes + self.constant_bytes + self.code_book_bytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits of weights and constants per weight, without the code books."""
        return 8 * (self.packed_bytes + self.constant_bytes) / self.parameters

    def __add__(self, other: QuantizedBytes) -> QuantizedBytes:
        return QuantizedBytes(
            parameters=self.parameters + other.parameters,
            packed_bytes=self.packed_bytes + other.packed_bytes,
            constant_bytes=self.constant_bytes + other.constant_bytes,
            code_book_bytes=self.code_book_bytes + other.code_book_bytes,
        )


_NOTHING = QuantizedBytes(parameters=0, packed_bytes=0, constant_bytes=0, code_book_bytes=0)


def tensor_bytes(weights: int, *, double_quantization: bool) -> QuantizedBytes:
    """Storage of one 4-bit tensor of `weights` elements; nf4 and fp4 take the same."""
    blocks = -(-weights // BLOCK_WEIGHTS)
    constants, code_books = blocks * _FP32_BYTES, _CODE_BOOK_BYTES
    if double_quantization:
        nested_blocks = -(-blocks // NESTED_BLOCK_CONSTANTS)
        offset_bytes = _FP32_BYTES
        constants = blocks + nested_blocks * _FP32_BYTES + offset_bytes
        code_books += _NESTED_CODE_BOOK_BYTES
    return QuantizedBytes(
        parameters=weights,
        packed_bytes=-(-weights // 2),
        constant_bytes=constants,
        code_book_bytes=code_books,
    )


def int8_tensor_bytes(*, inputs: int, outputs: int) -> QuantizedBytes:
    """Storage of one int8 weight of `inputs` x `outputs`."""
    weights = inputs * outputs
    return QuantizedBytes(
        parameters=weights, packed_bytes=weights, constant_bytes=outputs * _FP32_BYTES, code_book_bytes=0
    )


@lru_cache(maxsize=256)
def quantized_bytes(shape: Shape, *, double_quantization: bool) -> QuantizedBytes:
    """Storage of all 4-bit weights of a model: its linear layers without the head."""
    return sum(
        (
            tensor_bytes(module.in_features * module.out_features, double_quantization=double_quantization)
            for module in _quantized_modules(shape)
        ),
        start=_NOTHING,
    )


@lru_cache(maxsize=256)
def int8_bytes(shape: Shape) -> QuantizedBytes:
    """Storage of all int8 weights of a model: its linear layers without the head."""
    return sum(
        (
            int8_tensor_bytes(inputs=module.in_features, outputs=module.out_features)
            for module in _quantized_modules(shape)
        ),
        start=_NOTHING,
    )


def stored_bytes(shape: Shape, quantization: Quantization) -> QuantizedBytes | None:
    """Storage of a model's quantized weights as a trial asks for it; None where nothing is quantized."""
    if quantization.kind == "none":
        return None
    if quantization.kind == "int8":
        return int8_bytes(shape)
    return quantized_bytes(shape, double_quantization=quantization.double_quantization)


def _quantized_modules(shape: Shape) -> list[Module]:
    return [module for module in modules_of(shape) if module.kind in ("linear", "conv1d") and module.parts != ("head",)]
