"""One training step, or the generation of a few tokens, as lit-gpt took it, on fake tensors: what is alive when.

A step is one or more micro-steps that add up gradients, then the optimizer's update. Gradients are not clipped. The
loss is computed for 128 tokens at a time from logits in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.memory.live_bytes import CUDA_BLOCK_BYTES, LiveBytes
from lora_lab.optim.optimizers import PAGED_ELEMENTS, state_tensors
from lora_lab.plan.timeline import Place, Timeline
from lora_lab.predict.fake_model import fake_mode, to_fake
from lora_lab.predict.styles.lit_attention import RootMeanSquareNorm
from lora_lab.predict.styles.lit_linear import PackedLinear, Packing, Tuning
from lora_lab.predict.styles.lit_model import LitModel
from lora_lab.predict.styles.lit_shapes import LitShape
from lora_lab.train.places import placed

LitOptimizer = Literal["adamw", "paged_adamw", "sgd", "sgd_momentum"]

# Tokens whose logits are computed at once in training.
PIECE = 128


@dataclass(frozen=True, slots=True)
class LitRun:
    """length: tokens of every row of the longest micro-batch, as they are padded.

    first: it comes with the very first micro-step, when there are neither gradients nor optimizer states (lit-gpt of
    2023 puts the longest row there); else later, when there are states. accumulates: a step has several micro-steps, so
    that later there are gradients too. before: tokens of each row of the micro-batch before it, 0 for none. The loop's
    variables hold the logits and the loss of that one until they are assigned anew, and with them what 4-bit layers
    kept: autograd releases what is saved in its way, but not what a function keeps as an attribute.
    """

    shape: LitShape
    packing: Packing | None
    tuning: Tuning
    optimizer: LitOptimizer
    micro_batch: int
    length: int
    first: bool
    accumulates: bool
    before: int


def training_timeline(run: LitRun, *, block_bytes: int = CUDA_BLOCK_BYTES) -> Timeline:
    """The micro-step with the longest rows, the one before it, and the update. Sizes in multiples of block_bytes."""
    model = fake_model(run.shape, run.packing, run.tuning, run.length)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(run.optimizer, trained)
    if not run.first:
        _add_gradients(trained)
        _update(optimizer, run.optimizer, trained)
        if run.accumulates:
            _add_gradients(trained)
    with _recorded(model, state_tensors(optimizer), block_bytes) as live, placed(list(model.h), live):
        loop = _Loop(model, live)
        if run.before:
            loop.micro_step(run.micro_batch, run.before)
        loop.micro_step(run.micro_batch, run.length)
        live.claim("gradients", [parameter.grad for parameter in trained if parameter.grad is not None])
        live.place = Place("update")
        _update(optimizer, run.optimizer, trained)
        live.claim("optimizer_state", state_tensors(optimizer))
    return live.timeline()


def generation_timeline(shape: LitShape, packing: Packing | None, *, prompt: int, new: int) -> Timeline:
    """A prompt of so many tokens, and the first two of `new` tokens after it; room is made for all of them."""
    model = fake_model(shape, packing, Tuning("none"), prompt + new)
    with _recorded(model, [], CUDA_BLOCK_BYTES) as live, placed(list(model.h), live), torch.no_grad():
        live.place = Place("forward")
        model.keep_keys(prompt + new)
        place = torch.arange(prompt)
        for _ in range(2):
            logits = model.next_logits(torch.zeros(1, len(place), dtype=torch.long), place)
            torch.softmax(logits[0, -1] / 0.8, dim=-1)
            place = place[-1:] + 1
    return live.timeline()


class _Loop:
    """The training loop's variables, which outlive each micro-step."""

    def __init__(self, model: LitModel, live: LiveBytes) -> None:
        self._model, self._live = model, live
        self._logits: list[Tensor] = []
        self._loss: Tensor | None = None

    def micro_step(self, rows: int, length: int) -> None:
        """Adds the gradients of so many rows of so many tokens."""
        ids = torch.zeros(rows, length, dtype=torch.long)
        self._live.place = Place("forward")
        self._logits = self._model(ids, piece=PIECE)
        self._logits[-1] = self._logits[-1][..., :-1, :]
        self._loss = self._loss_of(ids[..., 1:])
        self._live.claim_live("activations")
        self._live.place = Place("backward")
        (self._loss / 128).backward()  # type: ignore[no-untyped-call]

    def _loss_of(self, targets: Tensor) -> Tensor:
        pieces = [part.reshape(-1, part.size(-1)) for part in self._logits]
        losses = [
            F.cross_entropy(part, target.reshape(-1), reduction="none")
            for part, target in zip(pieces, torch.split(targets, PIECE, dim=1), strict=False)
        ]
        return torch.cat(losses).mean()


def fake_model(shape: LitShape, packing: Packing | None, tuning: Tuning, longest: int) -> LitModel:
    """The model in bfloat16 on fake tensors; only what `tuning` trains has gradients."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LitModel(shape, packing, tuning, longest)
    finally:
        torch.set_default_dtype(before)
    to_fake(model, fake_mode())
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(_is_trained(module, name, tuning))
    return model


def _is_trained(module: nn.Module, name: str, tuning: Tuning) -> bool:
    if isinstance(module, PackedLinear):
        return False
    if tuning.kind == "full":
        return True
    if tuning.kind == "prompt_and_scale" and isinstance(module, RootMeanSquareNorm | nn.LayerNorm):
        return True
    if isinstance(module, nn.Embedding):
        return tuning.kind.startswith("prompt") and module.num_embeddings < PIECE
    return name.startswith(("lora_", "adapter_", "gating_"))


def _optimizer(kind: LitOptimizer, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    # On CUDA torch updates lists of tensors at once, and keeps a temporary of each while it does.
    if kind in ("sgd", "sgd_momentum"):
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9 if kind == "sgd_momentum" else 0.0, foreach=True)
    return torch.optim.AdamW(trained, lr=1e-3, foreach=kind == "adamw")


def _update(optimizer: torch.optim.Optimizer, kind: LitOptimizer, trained: list[nn.Parameter]) -> None:
    """One update and the end of all gradients. Paged states are made where they count: small ones, in float32."""
    if kind != "paged_adamw":
        optimizer.step()
    else:
        for parameter in trained:
            if parameter.numel() < PAGED_ELEMENTS and parameter not in optimizer.state:
                pair = [parameter.new_zeros(parameter.shape, dtype=torch.float32) for _ in range(2)]
                optimizer.state[parameter] = {"state1": pair[0], "state2": pair[1]}
    optimizer.zero_grad()


def _add_gradients(trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)


@contextmanager
def _recorded(model: LitModel, states: list[Tensor], block_bytes: int) -> Iterator[LiveBytes]:
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    parameters = list(model.parameters())
    known: dict[str, list[Tensor]] = {
        "quantization_constants": [buffer for module in packed for buffer in module.buffers()],
        "adapter": [parameter for parameter in parameters if parameter.requires_grad],
        "weights": [*parameters, *model.buffers()],
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
        "optimizer_state": states,
    }
    with LiveBytes(known.items(), block_bytes=block_bytes) as live:
        yield live
