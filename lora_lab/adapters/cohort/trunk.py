"""The forward pass of a cohort: one base, all members' rows, each with its own adapter.

The trunk is a copy of the base's modules over the same tensors (`models.shared_copy`). Members are models of their own
over these tensors too; nothing of them is changed here. A layer that some member adapts asks, in every pass, who sits
where. Members may come and go between two passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.cohort.parts import (
    changed_output,
    embedded,
    is_plain_lora,
    lora_rows,
    scaled_input,
    scales_input,
)
from lora_lab.adapters.cohort.product import adapted_product
from lora_lab.adapters.cohort.spans import Pass, Span, pass_over
from lora_lab.data.encode import Encoded
from lora_lab.models.ragged import RaggedModel
from lora_lab.models.shared_copy import shared_copy


class Trunk:
    """Computes the members' logits on one frozen `base`, a plain causal LM of transformers for which
    `models.ragged.why_not_ragged` has no objection. `model`: the copy that computes; it may be set to checkpoint."""

    def __init__(self, base: Any) -> None:
        self.model = shared_copy(base)
        self._ragged = RaggedModel(self.model)
        self._layers: dict[str, dict[str, Any]] = {}
        self._opened: set[str] = set()
        self._pass: Pass | None = None
        self._head = next(name for name, one in self.model.named_modules() if one is self.model.get_output_embeddings())
        self.model.get_output_embeddings().register_forward_pre_hook(self._choose)
        self.model.train()

    @property
    def members(self) -> list[str]:
        """Names of those who are seated, in the order in which they came."""
        return list(self._layers)

    def join(self, name: str, model: PeftModel) -> None:
        """Seats a member: `model` carries its adapter, on the tensors of the same base."""
        if name in self._layers:
            raise ValueError(f"{name} is seated already")
        adapted = {
            place: layer
            for place, layer in model.get_base_model().named_modules()
            if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters
        }
        for place in adapted:
            self._open(place)
        self._layers[name] = adapted

    def leave(self, name: str) -> None:
        """Takes a member away; the others' passes are what they were."""
        del self._layers[name]

    def __call__(self, batches: Mapping[str, Sequence[Encoded]]) -> tuple[Tensor, Pass]:
        """A micro-batch of each member by name -> logits [loss tokens of all, vocabulary], and whose they are.

        The pass is kept until the next one, as layers may be computed again: backward passes come before that.
        """
        now = self._pass = pass_over(batches, self.model.device)
        logits: Tensor = self._ragged(now.input_ids, now.rows).logits
        return logits.squeeze(0), now

    def _choose(self, _head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._pass is not None
        return (inputs[0].index_select(1, self._pass.chosen), *inputs[1:])

    def _open(self, place: str) -> None:
        """Lets the members into a layer of the trunk, once."""
        module = self.model.get_submodule(place)
        if place in self._opened:
            return
        self._opened.add(place)
        forward: Callable[..., Tensor] = module.forward
        adapted = self._embedding if isinstance(module, nn.Embedding) else self._linear
        module.forward = functools.partial(adapted, place, module, forward)

    def _seats(self, place: str) -> list[tuple[Span, Any]]:
        """All members of this pass in order: span, and layer at `place`, None for who does not adapt it."""
        assert self._pass is not None
        spans = self._pass.outputs if place == self._head else self._pass.tokens
        return [(span, self._layers[name].get(place)) for name, span in spans.items()]

    def _embedding(self, place: str, _module: nn.Module, forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
        y, seats = forward(ids), self._seats(place)
        if all(layer is None for _, layer in seats):
            return y
        parts = zip(seats, _split(ids.squeeze(0), seats), _split(y.squeeze(0), seats), strict=True)
        return torch.cat([own if layer is None else embedded(layer, i, own) for (_, layer), i, own in parts])[None]

    def _linear(self, place: str, module: Any, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        seats = self._seats(place)
        rows = x.reshape(-1, x.shape[-1])
        if any(layer is not None and scales_input(layer) for _, layer in seats):
            parts = zip(seats, _split(rows, seats), strict=True)
            rows = torch.cat([scaled_input(layer, own) for (_, layer), own in parts])
        loras = [one for span, layer in seats if is_plain_lora(layer) for one in lora_rows(layer, span)]
        if not loras:
            y = forward(rows)
        elif type(module) is nn.Linear:
            y = adapted_product(rows, loras, weight=module.weight.T, bias=module.bias, product=None)
        elif type(module) is Conv1D:
            y = adapted_product(rows, loras, weight=module.weight, bias=module.bias, product=None)
        else:
            y = adapted_product(rows, loras, weight=None, bias=None, product=forward(rows))
        if any(layer is not None and not is_plain_lora(layer) for _, layer in seats):
            parts3 = zip(seats, _split(rows, seats), _split(y, seats), strict=True)
            y = torch.cat([changed_output(layer, span, own, out) for (span, layer), own, out in parts3])
        return y.view(*x.shape[:-1], -1)


def _split(values: Tensor, seats: Sequence[tuple[Span, Any]]) -> tuple[Tensor, ...]:
    """[all tokens, ...] member by member. One node of the graph: a slice each would make a whole gradient each."""
    return torch.split(values, [span.stop - span.start for span, _ in seats])
