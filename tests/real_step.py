"""A trial's training step on real tensors, counted as the prediction counts a fake one: for comparisons of the two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_lab.adapters.attach import attach
from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.models.ragged import why_not_ragged
from lora_lab.models.shared_copy import shared_copy
from lora_lab.plan.cohorts import why_not_fused
from lora_lab.plan.prediction import LongestRows
from lora_lab.predict.traced_step import stand_ins
from lora_lab.schema.trial import Trial
from lora_lab.train.checkpointing import decoder_layers, enable_checkpointing
from lora_lab.train.forward import Alone, Together
from lora_lab.train.member import member_of
from lora_lab.train.probe import Probe, probe_step
from tests.stepping import CPU


def real_step(
    trial: Trial, rows: LongestRows, cache: Path, *, block_bytes: int = 1, base: LoadedBase | None = None
) -> Probe:
    """The probe step that a run alone takes on a CPU, on rows of these lengths.

    base: the trial's, where it is loaded already, for several steps one after the other. It is left as it was: the step
    works on copies of its modules and the probe puts weights back.
    """
    loaded = base or load_base(
        trial.model, precision=trial.training.precision, quantization=trial.quantization, device=CPU, cache=cache
    )
    try:
        return _step(trial, rows, replace(loaded, model=shared_copy(loaded.model)), block_bytes)
    finally:
        loaded.model.requires_grad_(False)  # parameters are shared, and some methods train them
        loaded.model.zero_grad(set_to_none=True)


def _step(trial: Trial, rows: LongestRows, base: LoadedBase, block_bytes: int) -> Probe:
    plain = base.model
    attached = attach(shared_copy(plain), trial, tokenizer=base.tokenizer, steps=1000)
    member = member_of(trial, attached, stand_ins(trial, rows), name="real")
    attached.model.train()
    if (why_not_fused(trial) or why_not_ragged(plain, longest=max(rows.lengths))) is None:
        trunk = Trunk(plain)
        enable_checkpointing(trunk.model, trial.training.gradient_checkpointing)
        trunk.join(member.name, attached.model)
        return probe_step(
            Together(trunk), attached.model, member, layers=decoder_layers(trunk.model), block_bytes=block_bytes
        )
    model = attached.model
    enable_checkpointing(model, trial.training.gradient_checkpointing)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with loss_token_logits(model) as head:
        forward = Alone(head, pad_id=base.model.config.pad_token_id, device=CPU)
        return probe_step(forward, model, member, layers=decoder_layers(inner), block_bytes=block_bytes)
