"""8-bit linear layers that compute one function: LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339), in every mode.

Weights W [out, in] are stored as int8 codes C with one scale per output: s_o = max_i |W_oi|, C = round(127 W / s).
Each product quantizes its input rows in the same way and keeps outlier features apart (section 3, equation 8):

    O = {features i : |x_ti| >= threshold for some row t of the call}         (threshold 6.0)
    y_to = (s_t s_o / 127^2) sum_{i not in O} c_ti C_oi  +  sum_{i in O} x_ti (s_o C_oi / 127)  +  b_o

The sum over codes is exact (int32); the second part and all scaling are float32, rounded once, to the input's dtype.
The backward pass is straight through: dL/dx = dL/dy (s C / 127), as if the input had not been rounded.

bitsandbytes 0.50 computes this on CUDA (by its source; not run here). On a CPU its layer is another function in
training (the input is not quantized) than in evaluation, its constant 1 / 127^2 is too large by 1.8e-5 of itself, and
every input is kept until the backward pass even under gradient checkpointing. Here its kernels quantize and multiply;
the rest is written out, so that a run is scored on the function it was trained on.

O depends on all rows of a call, padding included: that is the method, and it lets a row's score depend a little on
its batch where features reach the threshold.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import Tensor

from lora_lab.errors import InputError, Problem

_LARGEST_CODE = 127


class Int8Linear(bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]  # bitsandbytes is untyped
    """A loaded `Linear8bitLt` whose forward pass is the one above. weight: int8 [out, in]; row_scales: fp32 [out]."""

    def __init__(self, loaded: Any) -> None:
        super().__init__(
            loaded.in_features,
            loaded.out_features,
            bias=loaded.bias is not None,
            has_fp16_weights=False,
            threshold=loaded.state.threshold,
            device="meta",
        )
        self.weight, self.bias, self.source_cls = loaded.weight, loaded.bias, loaded.source_cls
        # A buffer moves with the model and is counted with its memory. PEFT reads `state.SCB`.
        self.register_buffer("row_scales", loaded.weight.SCB, persistent=False)
        self.state.SCB = self.row_scales
        self.weight.CB = self.weight.SCB = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] of any floating dtype; returns [..., out] of the same dtype."""
        rows = x.reshape(-1, self.in_features)
        product: Tensor = _Product.apply(rows, self.weight, self.row_scales, self.state.threshold)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def use_one_product(model: Any, *, check: bool = True) -> None:
    """Puts `Int8Linear` in the place of every 8-bit layer of bitsandbytes. check: whether scales have values.

    Raises:
        InputError: a weight is beyond float16, in which bitsandbytes quantizes.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is bitsandbytes.nn.Linear8bitLt]
    broken = [name for name, layer in layers if check and not torch.isfinite(layer.weight.SCB).all()]
    if broken:
        rule = f"{broken[0]} holds weights beyond 65504 (float16), which int8 cannot store; use quantization=none"
        raise InputError(Problem("quantization", rule))
    for name, layer in layers:
        model.set_submodule(name, Int8Linear(layer))


class _Product(torch.autograd.Function):
    """rows [n, in], codes int8 [out, in], scales fp32 [out] -> fp32 [n, out], without the bias."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, codes: Tensor, scales: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtype = rows.dtype
        if not len(rows):  # the kernels for CUDA refuse it
            return rows.new_zeros((0, len(codes)), dtype=torch.float32)
        half = rows.to(torch.float16, copy=True, memory_format=torch.contiguous_format)  # it is written to
        row_codes, row_scales, outliers = bitsandbytes.functional.int8_vectorwise_quant(half, threshold=threshold)
        sums = bitsandbytes.functional.int8_linear_matmul(row_codes, codes)
        product: Tensor = sums * (row_scales[:, None] / _LARGEST_CODE) * (scales / _LARGEST_CODE)
        if outliers is not None and outliers.numel():  # None without a threshold
            columns = codes[:, outliers] * (scales[:, None] / _LARGEST_CODE)
            product = product.addmm(rows[:, outliers].float(), columns.T)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        scaled = (gradients[0] * (scales / _LARGEST_CODE)).to(ctx.dtype)
        return scaled @ codes.to(ctx.dtype), None, None, None
