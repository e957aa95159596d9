"""PEFT's own mixed-adapter batches as the slow reference of a cohort: every adapter's gradients from one pass.

PEFT lets each row of a batch choose its adapter (`adapter_names`), and refuses that in training by a check of a flag,
not by mathematics. It trains when

- the flag `training` of the tuner alone is put out, so that checkpointing and the layers stay in training mode;
- the backward pass runs while the hooks that carry the names are there: layers that are checkpointed are computed
  again in it, and without their hooks they would silently be computed with all active adapters;
- all adapters are active, else some are frozen.

For LoRA beside linear layers (nn.Linear, Conv1D, bitsandbytes 4-bit) and embeddings, without dropout (PEFT's draws from
global random state, in the order of a set of names) and without DoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_lab.data.encode import Encoded

Gradients = dict[str, dict[str, Tensor]]

_PAD = 0


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its settings, and its weights by the names that PEFT saves them under."""

    config: LoraConfig
    weights: Mapping[str, Tensor]

    @staticmethod
    def of(model: PeftModel) -> Adapter:
        """The one adapter that `model` carries."""
        (config,) = model.peft_config.values()
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        return Adapter(copy.deepcopy(config), {name: one.detach().clone() for name, one in weights.items()})


def reference_gradients(
    base: Any,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Sequence[Encoded]],
    *,
    checkpointing: bool = False,
    reentrant: bool = False,
    backward_within: bool = True,
) -> Gradients:
    """Of each adapter, by its name, the gradient of the mean loss per loss token of its own rows, by parameter.

    base: a plain causal LM without dropouts of its own; it is copied. batches: the rows of each. Names of parameters
    are those that PEFT saves. reentrant, backward_within: only to show what the reference must not do.
    """
    model = _with_adapters(base, adapters)
    model.base_model.set_adapter(list(adapters))
    model.train()
    _checkpoint(model, checkpointing, reentrant=reentrant)
    model.base_model.training = False  # this flag alone
    rows = [example for name in adapters for example in batches[name]]
    owners = [name for name in adapters for _ in batches[name]]
    ids, attention, targets = _padded(rows)
    with model.base_model._enable_peft_forward_hooks(adapter_names=owners):
        logits = model.base_model.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        losses = [_mean_loss(logits, targets, [owner == name for owner in owners]) for name in adapters]
        if backward_within:
            torch.autograd.backward(losses)
    if not backward_within:
        torch.autograd.backward(losses)
    return {name: _gradients(model, name) for name in adapters}


def separate_gradients(
    base: Any, adapters: Mapping[str, Adapter], batches: Mapping[str, Sequence[Encoded]], *, checkpointing: bool = False
) -> Gradients:
    """The same from ordinary runs of PEFT: one adapter, its own rows and an ordinary call in training mode, each."""
    found: Gradients = {}
    for name, adapter in adapters.items():
        model = _with_adapters(base, {name: adapter})
        model.train()
        _checkpoint(model, checkpointing)
        ids, attention, targets = _padded(batches[name])
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        _mean_loss(logits, targets, [True] * len(ids)).backward()
        found[name] = _gradients(model, name)
    return found


def apart(one: Gradients, other: Gradients, names: Iterable[str] | None = None) -> float:
    """The largest difference of two sets of gradients, in proportion to the largest element of each tensor."""
    assert one.keys() == other.keys()
    found = [0.0]
    for name in one if names is None else names:
        assert one[name].keys() == other[name].keys() and one[name], name
        for key, tensor in one[name].items():
            size = max(float(other[name][key].abs().max()), 1e-30)
            difference = float((tensor.double() - other[name][key].double()).abs().max()) / size
            found.append(float("inf") if difference != difference else difference)
    return max(found)


def _with_adapters(base: Any, adapters: Mapping[str, Adapter]) -> PeftModel:
    model: PeftModel | None = None
    for name, adapter in adapters.items():
        config = copy.deepcopy(adapter.config)
        config.inference_mode = False
        if model is None:
            model = get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        loaded = set_peft_model_state_dict(model, dict(adapter.weights), adapter_name=name)
        assert not loaded.unexpected_keys
    assert model is not None
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.register_forward_hook(_own)
    return model


def _own(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    """With a bias a 4-bit layer answers with a view, which PEFT must not add to in place where there is a graph."""
    return output.clone()


def _checkpoint(model: PeftModel, wanted: bool, *, reentrant: bool = False) -> None:
    if wanted:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()


def _padded(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and targets (-100 where there is no loss), each [rows, longest]; padded at the end."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), _PAD)
    attention = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        attention[index, :length] = 1
        targets[index, :length] = torch.where(torch.tensor(row.loss_mask), ids[index, :length], -100)
    return ids, attention, targets


def _mean_loss(logits: Tensor, targets: Tensor, chosen: Sequence[bool]) -> Tensor:
    """Mean loss per loss token of the chosen rows; the logits at one token are of the next."""
    mine = torch.tensor(chosen)
    return cross_entropy(logits[mine, :-1].flatten(0, 1), targets[mine, 1:].flatten(), ignore_index=-100)


def _gradients(model: PeftModel, name: str) -> dict[str, Tensor]:
    """By the names that PEFT saves: the adapter's own is not in them."""
    found = {}
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        if name in parts and parameter.requires_grad:
            assert parameter.grad is not None, key
            parts.remove(name)
            found[".".join(parts)] = parameter.grad.detach().clone()
    return found
