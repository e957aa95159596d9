"""The training of one run around its steps: probe before, log beside, totals and weights after them.

Whoever drives it calls `begin`, then `on_step` for each step of `member`, then `finish`.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from lora_lab.adapters.attach import Attached
from lora_lab.adapters.changed import save_changed
from lora_lab.adapters.prompts import check_room, virtual_tokens
from lora_lab.adapters.save import save_adapter, save_model
from lora_lab.data.encode import EncodedSet
from lora_lab.errors import DataError, InputError
from lora_lab.memory.live_bytes import model_tensors, storage_bytes
from lora_lab.memory.meter import memory_now
from lora_lab.models.load import LoadedBase
from lora_lab.optim.optimizers import optimizer_facts, state_tensors
from lora_lab.plan.job import Job
from lora_lab.record.checkpoint import read_checkpoint
from lora_lab.record.evaluation_log import EVALUATIONS_FILE, carry_evaluations
from lora_lab.record.gathered import Gathered
from lora_lab.record.layer_log import copy_observations, observed_steps
from lora_lab.record.parents import weights_identity
from lora_lab.record.result import Metric
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.run_record import LAYERS_FILE, STEPS_FILE
from lora_lab.record.step_log import NONFINITE, StepLog, copy_steps, read_steps
from lora_lab.record.watcher import Watcher
from lora_lab.runner.observation import Observer
from lora_lab.train.forward import Forward
from lora_lab.train.member import Member, StepRecord, member_of
from lora_lab.train.probe import Probe, probe_step
from lora_lab.train.saved_state import load_state, save_state


class Training:
    """member: the run as the loop knows it, named by its run id."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        gathered: Gathered,
        base: LoadedBase,
        attached: Attached,
        examples: EncodedSet,
        *,
        watcher: Watcher,
        checkpoint_seconds: float,
    ) -> None:
        """Raises InputError where rows and virtual tokens do not fit into the context."""
        self._checkpoint_seconds = checkpoint_seconds
        self._job, self._folder, self._gathered, self._base, self._watcher = job, folder, gathered, base, watcher
        self.attached = attached
        self.longest = max(examples.lengths)
        check_room(attached.model, virtual_tokens(attached.model), self.longest)
        self.member = member_of(job.trial, attached, examples.examples, name=folder.run_id)
        gathered.measurements |= {
            **_weight_bytes(attached),
            "train_rows": len(examples.examples),
            "cut_rows": examples.cut_rows,
            "loss_token_fraction": examples.loss_share,
        }
        self._observed = observed_steps(self.member.total_steps)

    @property
    def tokens_per_tick(self) -> float:
        """Tokens of a micro-batch, on average over the data."""
        examples = self.member.examples
        mean = sum(len(example.input_ids) for example in examples) / len(examples)
        return mean * min(len(examples), self._job.trial.training.micro_batch_size)

    def probe(self, forward: Forward) -> Probe:
        """The memory of a step of this member alone; what it does is undone."""
        self._watcher.phase(self._folder.run_id, "measuring memory")
        self.attached.model.train()
        with self._gathered.timed("probe"):
            probe = probe_step(forward, self.attached.model, self.member)
        if self.attached.routing is not None:
            self.attached.routing.clear()  # what it heard of the probe is no training
        self._gathered.facts["probe"] = "alone"
        return probe

    def note_rows(self, how: str) -> None:
        """For the record: how rows of unequal length are handed to the model."""
        self._gathered.facts["rows"] = how

    def begin(self, device: torch.device) -> None:
        """Goes on from the checkpoint of an earlier attempt, if there is one, and opens the log."""
        self._device = device
        self._resume()
        self._saved_at = time.monotonic()
        self._watcher.phase(self._folder.run_id, "training")
        self._observer = Observer(self.attached, self._folder.layers_path, original=self._original())
        self._log = StepLog(self._folder.steps_path)
        self.attached.model.train()

    def on_step(self, record: StepRecord) -> None:
        """Logs a step, and looks at layers and routers where it is time."""
        # Of a step that was shared, memory is the cohort's, as its time is.
        values = {**record.values(), **({} if record.seconds is None else memory_now(self._device))}
        self._log.write(record.step, values)
        self._watcher.step(self._folder.run_id, record.step, values)
        if record.step in self._observed:
            self._observer.observe(record.step)
        # At the end of an adapter's training too: who is killed while it is scored need not be trained again.
        is_last = record.step == self.member.total_steps and self._job.trial.method.saves == "adapter"
        if is_last or time.monotonic() - self._saved_at >= self._checkpoint_seconds:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Keeps the state between two steps on disk, in place of an older one."""
        start = time.perf_counter()
        self._log.sync()
        save_state(self.member, self.attached, self._folder.checkpoint_folder)
        self._folder.drop_earlier_checkpoints()
        self._saved_at = time.monotonic()
        seconds = self._gathered.measurements
        seconds["checkpoint_seconds"] = seconds.get("checkpoint_seconds", 0.0) + time.perf_counter() - start

    def stop(self) -> None:
        """Ends the training before its last step; it can be gone on with from the checkpoint."""
        self.close()
        self._gather()

    def finish(self) -> str | None:
        """Gathers totals and saves; returns why it diverged, or None."""
        self.close()
        self._gather()
        return self._save()

    def _gather(self) -> None:
        self._gathered.measurements["observe_seconds"] = self._observer.seconds
        _gather_training(self.member, self._gathered, device=self._device)

    def _resume(self) -> None:
        checkpoint = self._folder.resumable()
        if checkpoint is None:
            return
        earlier = checkpoint.parent
        try:
            step = int(read_checkpoint(checkpoint)[0]["step"])
            copy_steps(earlier / STEPS_FILE, self._folder.steps_path, up_to=step)
            copy_observations(earlier / LAYERS_FILE, self._folder.layers_path, up_to=step)
            carry_evaluations(earlier, self._folder.path, step=step)
            load_state(self.member, self.attached, checkpoint)
        except (InputError, DataError) as error:
            for name in (STEPS_FILE, LAYERS_FILE, EVALUATIONS_FILE):
                (self._folder.path / name).unlink(missing_ok=True)
            self._gathered.warnings.append(f"begun anew, since the checkpoint could not be used: {error}")
            return
        self._gathered.facts["resumed"] = {"attempt": int(earlier.name), "step": step}
        for line in read_steps(self._folder.steps_path):  # who watches this attempt is shown the whole curve
            values = {key: value for key, value in line.items() if key not in ("step", NONFINITE)}
            self._watcher.step(self._folder.run_id, line["step"], values)

    def close(self) -> None:
        """Puts the log on disk; doing so twice is fine."""
        if hasattr(self, "_log"):
            self._log.close()

    def _original(self) -> Path | None:
        """Where the weights lie that a training of the model's own weights starts from."""
        trial, facts = self._job.trial, self._base.facts
        return Path(facts["model_folder"]) if trial.method.trains == "weights" and trial.init_from is None else None

    def _save(self) -> str | None:
        member, folder, attached = self.member, self._folder, self.attached
        form = self._job.trial.method.saves
        name = f"{form}_file_bytes"
        if not all(bool(torch.isfinite(parameter).all()) for parameter in member.parameters):
            self._gathered.missing[name] = "not saved: the weights hold NaN or Inf"
            return member.diverged or f"step {member.step}: the update left weights that are not finite"
        with self._gathered.timed("save"):
            if form == "adapter":
                size = save_adapter(attached.model, folder.adapter_folder)
            elif form == "changed":
                names, identity = attached.changed_after(member.step), weights_identity(self._job.identities)
                size = save_changed(attached.model, names, folder.changed_folder, identity=identity)
            else:
                size = save_model(attached.model, self._base.tokenizer, folder.model_folder)
        self._gathered.measurements[name] = size
        return member.diverged


def _weight_bytes(attached: Attached) -> dict[str, int]:
    """Bytes of the weights, 4-bit constants and buffers included, told apart by whether they are trained."""
    trainable = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    trainable_bytes = storage_bytes(trainable)
    frozen_bytes = storage_bytes(model_tensors(attached.model)) - trainable_bytes
    return {"frozen_weight_bytes": frozen_bytes, "trainable_weight_bytes": trainable_bytes}


def _gather_training(member: Member, gathered: Gathered, *, device: torch.device) -> None:
    """Totals of the step records. Speed is real tokens over the time of the steps themselves."""
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
    if not member.records:
        gathered.missing["tokens_per_second"] = "no step was finished"
        return
    gathered.measurements["padding_fraction"] = 1 - tokens / padded
    seconds = [record.seconds for record in member.records if record.seconds is not None]
    if len(seconds) == len(member.records):
        gathered.measurements |= {"step_seconds": sum(seconds), "tokens_per_second": tokens / sum(seconds)}
    gathered.metrics["train/loss"] = Metric(
        value=member.records[-1].loss,
        unit="nats/token",
        higher_is_better=False,
        standard_error=None,
        num_examples=None,
    )
