"""The training phase of a job: memory first, then every step with its log, then what was trained is saved."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_lab.adapters.attach import Attached
from lora_lab.adapters.changed import save_changed
from lora_lab.adapters.prompts import check_room, virtual_tokens
from lora_lab.adapters.save import save_adapter, save_model
from lora_lab.data.encode import EncodedSet
from lora_lab.memory.live_bytes import model_tensors, storage_bytes
from lora_lab.memory.meter import MemoryMeter, memory_now
from lora_lab.models.load import LoadedBase
from lora_lab.optim.optimizers import optimizer_facts, state_tensors
from lora_lab.plan.job import Job
from lora_lab.record.gathered import Gathered
from lora_lab.record.layer_log import observed_steps
from lora_lab.record.parents import weights_identity
from lora_lab.record.result import Metric
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.step_log import StepLog
from lora_lab.record.watcher import Watcher
from lora_lab.runner.observation import Observer
from lora_lab.train.checkpointing import enable_checkpointing
from lora_lab.train.loop import train
from lora_lab.train.member import Member, StepRecord, member_of
from lora_lab.train.probe import probe_step


def train_and_save(
    job: Job,
    folder: RunFolder,
    gathered: Gathered,
    base: LoadedBase,
    attached: Attached,
    examples: EncodedSet,
    *,
    meter: MemoryMeter,
    watcher: Watcher,
) -> str | None:
    """Trains and saves; returns why it diverged, or None."""
    device = base.model.device
    check_room(attached.model, virtual_tokens(attached.model), max(examples.lengths))
    gathered.measurements |= _weight_bytes(attached)
    member = member_of(job.trial, attached, examples.examples, name=job.name)
    enable_checkpointing(attached.model, job.trial.training.gradient_checkpointing)
    gathered.measurements |= {
        "train_rows": len(examples.examples),
        "cut_rows": examples.cut_rows,
        "loss_token_fraction": examples.loss_share,
    }
    if device.type != "cuda":
        watcher.phase(folder.run_id, "measuring memory")
        with gathered.timed("probe"):
            probe = probe_step(attached.model, member, pad_id=base.tokenizer.pad_token_id, device=device)
        if attached.routing is not None:
            attached.routing.clear()  # what it heard of the probe is no training
        gathered.measurements |= {
            "peak_allocated_bytes": probe.peak_bytes,
            "gradient_bytes": probe.gradient_bytes,
        }
    else:
        gathered.missing["gradient_bytes"] = "counted on the probe step, which only a CPU needs"
    watcher.phase(folder.run_id, "training")
    observer = Observer(attached, folder.layers_path, original=_original(job, base))
    observed = observed_steps(member.total_steps)
    with StepLog(folder.steps_path) as log, gathered.timed("train"), meter.phase("train"):

        def on_step(trained: Member, record: StepRecord) -> None:
            values = {**record.values(), **memory_now(device)}
            log.write(record.step, values)
            watcher.step(folder.run_id, record.step, values)
            if record.step in observed:
                observer.observe(record.step)

        train(attached.model, [member], pad_id=base.tokenizer.pad_token_id, device=device, on_step=on_step)
    gathered.measurements["observe_seconds"] = observer.seconds
    _gather_training(member, gathered, device=device)
    if device.type == "cuda":
        gathered.measurements["peak_allocated_bytes"] = meter.measurements["train_peak_allocated_bytes"]
        gathered.measurements["peak_reserved_bytes"] = meter.measurements["train_peak_reserved_bytes"]
    watcher.phase(folder.run_id, "saving")
    return _save(job, folder, gathered, base, attached, member)


def _original(job: Job, base: LoadedBase) -> Path | None:
    """Where the weights lie that a training of the model's own weights starts from."""
    trial = job.trial
    return Path(base.facts["model_folder"]) if trial.method.trains == "weights" and trial.init_from is None else None


def _save(
    job: Job, folder: RunFolder, gathered: Gathered, base: LoadedBase, attached: Attached, member: Member
) -> str | None:
    form = job.trial.method.saves
    name = f"{form}_file_bytes"
    if not all(bool(torch.isfinite(parameter).all()) for parameter in member.parameters):
        gathered.missing[name] = "not saved: the weights hold NaN or Inf"
        return member.diverged or f"step {member.step}: the update left weights that are not finite"
    with gathered.timed("save"):
        if form == "adapter":
            size = save_adapter(attached.model, folder.adapter_folder)
        elif form == "changed":
            names = attached.changed_after(member.step)
            size = save_changed(attached.model, names, folder.changed_folder, identity=weights_identity(job.identities))
        else:
            size = save_model(attached.model, base.tokenizer, folder.model_folder)
    gathered.measurements[name] = size
    return member.diverged


def _weight_bytes(attached: Attached) -> dict[str, int]:
    """Bytes of the weights, 4-bit constants and buffers included, told apart by whether they are trained."""
    trainable = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    trainable_bytes = storage_bytes(trainable)
    frozen_bytes = storage_bytes(model_tensors(attached.model)) - trainable_bytes
    return {"frozen_weight_bytes": frozen_bytes, "trainable_weight_bytes": trainable_bytes}


def _gather_training(member: Member, gathered: Gathered, *, device: torch.device) -> None:
    """Totals of the step records. Speed is real tokens over the time of the steps themselves."""
    seconds = sum(record.seconds for record in member.records)
    tokens = sum(record.tokens for record in member.records)
    padded = sum(record.padded_tokens for record in member.records)
    gathered.measurements |= {
        "steps": member.step,
        "tokens": tokens,
        "loss_tokens": sum(record.loss_tokens for record in member.records),
        "optimizer_state_bytes": storage_bytes(state_tensors(member.optimizer)),
    }
    gathered.facts["optimizer"] = optimizer_facts(member.optimizer, device=device)
    if gathered.facts["optimizer"]["paging"].startswith("asked for"):
        gathered.warnings.append(f"paging {gathered.facts['optimizer']['paging']}")
    still = sum(record.gradient_norm == 0 for record in member.records)
    if still:
        gathered.warnings.append(
            f"the gradient norm was exactly 0 at {still} of {member.step} steps: nothing was learnt there"
        )
    if member.records:
        gathered.measurements |= {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "padding_fraction": 1 - tokens / padded,
        }
        gathered.metrics["train/loss"] = Metric(
            value=member.records[-1].loss,
            unit="nats/token",
            higher_is_better=False,
            standard_error=None,
            num_examples=None,
        )
    else:
        gathered.missing["tokens_per_second"] = "no step was finished"
