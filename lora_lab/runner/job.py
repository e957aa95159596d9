"""One job -> one result: load, attach, train, save, score, and record whatever happened.

An outcome is data: a run that diverges, runs out of memory, is interrupted or fails is recorded with what it measured.
"""

from __future__ import annotations

import gc
import traceback
from pathlib import Path

import torch

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.data.encode import EncodedSet, encode_rows
from lora_lab.data.row_types import group_problems, types_of
from lora_lab.data.sources import load_rows
from lora_lab.errors import DataError, IdentityError, LabError, MachineError, Problem
from lora_lab.evaluate.identity import evaluation_identities
from lora_lab.evaluate.score import score_model
from lora_lab.memory.meter import MemoryMeter
from lora_lab.plan.identity import identities_of
from lora_lab.plan.job import Job
from lora_lab.plan.steps import steps_of
from lora_lab.record.atomic import write_text
from lora_lab.record.environment import utc_now
from lora_lab.record.gathered import Gathered
from lora_lab.record.ledger import Ledger
from lora_lab.record.model_card import write_cards
from lora_lab.record.parents import PARENT_ROLES
from lora_lab.record.result import Result, Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.watcher import Watcher
from lora_lab.restore import Restorer
from lora_lab.runner.training import train_and_save
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.fingerprint import NUMERICS_VERSION

# Above this share of cut rows a result says so.
_MANY_CUTS = 0.05


def run_job(job: Job, folder: RunFolder, *, device: torch.device, cache: Path, watcher: Watcher) -> Result:
    """Runs one job in its claimed folder and writes its result.

    Raises:
        KeyboardInterrupt, MachineError: after they have been recorded; the next run would fare no better.
    """
    gathered = Gathered()
    started_at, status, reason = utc_now(), Status.COMPLETED, None
    gathered.note_load("before")
    stop: BaseException | None = None
    steps = steps_of(job.trial, job.train_rows)
    watcher.run_started(folder.header, folder.path, steps=0 if steps is None else steps.steps)
    with gathered.timed("wall"):
        try:
            status, reason = _carry_out(job, folder, gathered, device=device, cache=cache, watcher=watcher)
        except KeyboardInterrupt as signal:
            status, reason, stop = Status.INTERRUPTED, "interrupted (Ctrl-C)", signal
        except LabError as error:
            status, reason = Status.FAILED, str(error)
            stop = error if isinstance(error, MachineError) else None
        except Exception as error:  # noqa: BLE001 - a bug in one run is recorded, and does not stop the sweep
            status = Status.OUT_OF_MEMORY if _is_out_of_memory(error) else Status.FAILED
            reason = f"{type(error).__name__}: {error}"
            write_text(folder.path / "traceback.txt", traceback.format_exc())
    gathered.note_load("after")
    result = _result(job, folder, gathered, status=status, reason=reason, started_at=started_at)
    folder.write_result(result)
    write_cards(folder.path, folder.header, result)
    watcher.run_finished(folder.header, folder.path, result)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if stop is not None:
        raise stop
    return result


def _is_out_of_memory(error: Exception) -> bool:
    """torch has no exception class of its own for a CPU that runs out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _carry_out(
    job: Job, folder: RunFolder, gathered: Gathered, *, device: torch.device, cache: Path, watcher: Watcher
) -> tuple[Status, str | None]:
    meter = MemoryMeter(device)
    gathered.facts["device"] = str(device)
    gathered.facts["executed"] = "alone"
    try:
        _verify_identities(job, cache=cache)
        watcher.phase(folder.run_id, "loading")
        with gathered.timed("load"), meter.phase("load"):
            rows = load_rows(job.trial.data, cache=cache)
            if problems := group_problems(job.trial.method, types_of(rows.train)):
                raise DataError(problems)
            restorer = Restorer(Ledger(folder.ledger_root), cache, device)
            base = restorer.base_of(job.trial, job.identities)
            gathered.facts |= base.facts
            steps = steps_of(job.trial, len(rows.train))
            attached = attach(
                base.model,
                job.trial,
                tokenizer=base.tokenizer,
                steps=None if steps is None else steps.steps,
                probabilities=restorer.layer_probabilities(job.trial, job.identities),
            )
            restorer.start_adapter(job.trial, job.identities, attached.model)
            heldout = encode_rows(rows.heldout, base.tokenizer, job.trial.data, vocab_size=base.model.config.vocab_size)
            _warn_about_cuts(gathered, heldout, side="held-out", max_length=job.trial.data.max_length)
        trainable, total = count_parameters(attached.model)
        gathered.measurements |= {"trainable_parameters": trainable, "total_parameters": total}
        diverged = None
        if job.trial.method.kind != "base":
            examples = encode_rows(rows.train, base.tokenizer, job.trial.data, vocab_size=base.model.config.vocab_size)
            _warn_about_cuts(gathered, examples, side="training", max_length=job.trial.data.max_length)
            diverged = train_and_save(job, folder, gathered, base, attached, examples, meter=meter, watcher=watcher)
        if diverged is not None:
            gathered.missing["scores"] = "the run diverged"
            return Status.DIVERGED, diverged
        watcher.phase(folder.run_id, "scoring")
        with gathered.timed("evaluate"), meter.phase("evaluate"):
            scores = score_model(
                attached.model,
                base.tokenizer,
                heldout.examples,
                rows.heldout,
                job.trial,
                cache=cache,
                output=folder.eval_folder,
                progress=lambda read, total: watcher.phase(folder.run_id, f"scoring: {read / total:.0%}"),
            )
        gathered.metrics |= scores.metrics
        gathered.missing |= scores.missing
        gathered.facts["evaluation"] = scores.facts
        _warn_about_limit(gathered, job.trial.evaluation)
        reasons = dict.fromkeys(call["why_stock"] for call in scores.facts.get("engine", ()) if "why_stock" in call)
        gathered.warnings += [f"scored by lm-eval's own engine, not the tree: {reason}" for reason in reasons]
        return Status.COMPLETED, None
    finally:
        gathered.measurements |= meter.measurements
        gathered.missing |= meter.missing


def _verify_identities(job: Job, *, cache: Path) -> None:
    """Files may change while a sweep goes on; a run on other texts than were planned would mix two trials."""
    now = identities_of(job.trial, cache=cache, extra=evaluation_identities(job.trial.evaluation, cache=cache))
    own = {role: identity for role, identity in job.identities.items() if role not in PARENT_ROLES}
    changed = [role for role, identity in own.items() if now.get(role) != identity]
    if changed:
        raise IdentityError(
            [
                Problem(role, f"changed since the sweep was planned: {job.identities[role]} -> {now.get(role)}")
                for role in changed
            ]
        )


def _warn_about_cuts(gathered: Gathered, examples: EncodedSet, *, side: str, max_length: int) -> None:
    if examples.cut_share > _MANY_CUTS:
        gathered.warnings.append(
            f"{examples.cut_rows} of {len(examples.examples)} {side} rows are longer than data.max_length={max_length} "
            "tokens and were cut"
        )


def _warn_about_limit(gathered: Gathered, evaluation: Evaluation) -> None:
    counts = {name.partition("/")[0]: metric.num_examples for name, metric in gathered.metrics.items()}
    for task in evaluation.tasks:
        count = counts.get(task)
        if evaluation.limit is not None and count is not None and count < evaluation.limit:
            gathered.warnings.append(f"{task} has {count} documents, fewer than evaluation.limit={evaluation.limit}")


def _result(
    job: Job, folder: RunFolder, gathered: Gathered, *, status: Status, reason: str | None, started_at: str
) -> Result:
    measurements = dict(gathered.measurements)
    gathered.missing["predicted_peak_allocated_bytes"] = "this version does not predict memory yet"
    return Result(
        schema_version=1,
        numerics_version=NUMERICS_VERSION,
        run_id=folder.run_id,
        fingerprint=job.fingerprint,
        setting=job.setting,
        repeat=job.repeat,
        attempt=folder.attempt,
        status=status,
        reason=reason,
        started_at=started_at,
        finished_at=utc_now(),
        trainable_parameters=_count(measurements.pop("trainable_parameters", None)),
        total_parameters=_count(measurements.pop("total_parameters", None)),
        predicted_peak_allocated_bytes=None,
        metrics=gathered.metrics,
        measurements=measurements,
        facts=gathered.facts | {"warnings": gathered.warnings},
        missing=gathered.missing,
    )


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)
