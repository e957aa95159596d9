"""A run by itself: its training from the first step to the last, and everything measured under its own keys."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.memory.malloc import give_back
from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.plan.job import Job
from lora_lab.record.result import Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.runner.desk import Desk
from lora_lab.runner.outcome import Outcome
from lora_lab.runner.run import Run
from lora_lab.runner.training import Training
from lora_lab.runner.workbench import Workbench
from lora_lab.train.checkpointing import enable_checkpointing
from lora_lab.train.forward import Alone, Forward, Together
from lora_lab.train.loop import tick


def run_alone(job: Job, folder: RunFolder, desk: Desk) -> Status:
    """Runs one job in its claimed folder and writes its result.

    Raises:
        KeyboardInterrupt, MachineError: after they have been recorded; the next run would fare no better.
    """
    ended = _run_alone(Run(job, folder, desk, shared=None))
    let_go(desk.bench.device)
    if ended.stop is not None:
        raise ended.stop
    return ended.status


def _run_alone(run: Run) -> Outcome:
    def train() -> None:
        if run.training is not None:
            with forward_alone(run.training, run.job, run.bench) as forward:
                _train(run, run.training, forward)

    # One phase after another, until one fails or all are through.
    for phase in (run.prepare, train, run.complete):
        if run.outcome is None:
            run.attempt(phase)
    return run.close()


def let_go(device: torch.device) -> None:
    """Frees what a run has left: adapters' layers know each other in circles."""
    gc.collect()
    give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def together_on(job: Job, bench: Workbench) -> Together:
    """An empty trunk on the base of a job, with its gradient checkpointing."""
    trunk = Trunk(bench.plain_base(job))
    enable_checkpointing(trunk.model, job.trial.training.gradient_checkpointing)
    return Together(trunk)


@contextlib.contextmanager
def forward_alone(training: Training, job: Job, bench: Workbench) -> Iterator[Forward]:
    """How a single run's model is called: without padding where its method and model allow it."""
    member, model = training.member, training.attached.model
    why_padded = bench.why_not_together(job, training.longest)
    training.note_rows("end to end" if why_padded is None else f"padded: {why_padded}")
    if why_padded is None:
        forward = together_on(job, bench)
        forward.trunk.join(member.name, model)
        yield forward
        return
    enable_checkpointing(model, job.trial.training.gradient_checkpointing)
    with loss_token_logits(model) as head:
        yield Alone(head, pad_id=model.config.pad_token_id, device=bench.device)


def _train(run: Run, training: Training, forward: Forward) -> None:
    measured = run.gathered.measurements
    if forward.device.type == "cuda":
        run.gathered.missing["gradient_bytes"] = "counted on the probe step, which only a CPU needs"
    else:
        probe = training.probe(forward)
        measured |= {"peak_allocated_bytes": probe.peak_bytes, "gradient_bytes": probe.gradient_bytes}
    with run.measured("train"):
        training.begin(forward.device)
        while training.member.is_active and run.outcome is None:
            run.evaluate_point()
            run.judge()
            if run.outcome is None:
                tick(forward, [training.member], on_step=lambda _, record: training.on_step(record), timed=True)
    if forward.device.type == "cuda":
        for kind in ("allocated", "reserved"):
            measured[f"peak_{kind}_bytes"] = run.meter.measurements[f"train_peak_{kind}_bytes"]
