"""One run, from a claimed folder to a result: prepare, train (tick by tick, by whoever drives it), save, score, record.

A run that shares its passes with others (`cohort`) has what it did by itself measured under its own keys; time and
memory that were shared are the cohort's, under the cohort's keys, and missing under its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lora_lab.adapters.attach import Attached, attach, count_parameters
from lora_lab.data.row_types import group_problems, types_of
from lora_lab.errors import DataError
from lora_lab.evaluate.score import score_model
from lora_lab.memory.meter import MemoryMeter, Unmeasured
from lora_lab.models.load import LoadedBase
from lora_lab.plan.job import Job
from lora_lab.plan.steps import steps_of
from lora_lab.record.environment import utc_now
from lora_lab.record.gathered import Gathered
from lora_lab.record.model_card import write_cards
from lora_lab.record.result import Result, Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.runner.checks import verify_identities, warn_about_cuts, warn_about_limit
from lora_lab.runner.desk import Desk
from lora_lab.runner.outcome import COMPLETED, Outcome, outcome_of
from lora_lab.runner.predicted import note_prediction
from lora_lab.runner.search import Contestant
from lora_lab.runner.shared_cost import SharedCost
from lora_lab.runner.training import Training
from lora_lab.schema.fingerprint import NUMERICS_VERSION


class Run:
    """shared: the cohort's cost as this run sees it; None where it runs alone.

    training: what is driven between `prepare` and `complete`; None where nothing is trained. outcome: set once it has
    ended, by whatever phase.
    """

    def __init__(self, job: Job, folder: RunFolder, desk: Desk, *, shared: SharedCost | None) -> None:
        self.job, self.folder, self.shared = job, folder, shared
        self.bench, self.watcher, self._desk = desk.bench, desk.watcher, desk
        self.gathered = Gathered()
        self.outcome: Outcome | None = None
        self.training: Training | None = None
        self.contestant: Contestant | None = None
        self._meter = MemoryMeter(self.bench.device) if shared is None else Unmeasured(shared.why_missing)
        self._finally = contextlib.ExitStack()
        self._started_at = utc_now()
        self.gathered.facts |= {"device": str(self.bench.device), "executed": "alone" if shared is None else "cohort"}
        self.gathered.note_load("before")
        steps = steps_of(job.trial, job.train_rows)
        self.watcher.run_started(folder.header, folder.path, steps=0 if steps is None else steps.steps)
        if shared is None:
            self._finally.enter_context(self.gathered.timed("wall"))

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.folder.run_id

    def attempt(self, phase: Callable[[], None]) -> bool:
        """Whether `phase` went well; what it raised becomes the run's outcome."""
        try:
            phase()
        except BaseException as error:  # noqa: BLE001 - a bug in one run is recorded, and does not stop the sweep
            try:
                self.outcome = outcome_of(error, self.folder.path)
            except BaseException:
                self.folder.close()  # the process ends; others may have the run
                raise
            return False
        return True

    def prepare(self) -> None:
        """Loads, puts the method on the base, encodes the rows; where something is trained, `training` is set."""
        job = self.job
        verify_identities(job, cache=self.bench.cache)
        self.watcher.phase(self.run_id, "loading")
        with self.gathered.timed("load"), self._meter.phase("load"):
            self._rows = self.bench.rows_of(job)
            if problems := group_problems(job.trial.method, types_of(self._rows.train)):
                raise DataError(problems)
            self.base = self.bench.base_of(job)
            self.gathered.facts |= self.base.facts
            self.attached = self._attached(self.base)
            self._tokens = self.bench.tokens_of(job, self.base)
        warn_about_cuts(self.gathered, self._tokens.heldout, side="held-out", trial=job.trial)
        trainable, total = count_parameters(self.attached.model)
        self.gathered.measurements |= {"trainable_parameters": trainable, "total_parameters": total}
        if job.trial.method.kind != "base":
            warn_about_cuts(self.gathered, self._tokens.train, side="training", trial=job.trial)
            with self.gathered.timed("predict"):
                note_prediction(
                    self.gathered, job.trial, self._tokens.train, device=self.bench.device, cache=self.bench.cache
                )
            self.training = self._training()

    def evaluate_point(self) -> None:
        """Where the run stands at a point of its search: scores the held-out rows, and keeps its state."""
        if self.training is not None and self.contestant is not None and self.contestant.is_at_point:
            self.watcher.phase(self.run_id, "comparing")
            self.contestant.evaluate(self.folder)
            self.training.checkpoint()
            self.watcher.phase(self.run_id, "training")

    def judge(self) -> None:
        """Ends the run where the rule of its search does."""
        if self.training is None or self.contestant is None or not self.contestant.is_at_point:
            return
        stop = self.contestant.judge(self.folder)
        if stop is not None:
            self.training.stop()
            self.gathered.facts["stopping"] = stop.facts(self._desk.stopping)
            self.gathered.missing["scores"] = "the run was stopped early"
            self.outcome = Outcome(Status.STOPPED, stop.reason)

    def complete(self) -> None:
        """Saves what was trained, and scores it unless it diverged."""
        if self.training is not None:
            self.watcher.phase(self.run_id, "saving")
            diverged = self.training.finish()
            self.training = None
            if diverged is not None:
                self.gathered.missing["scores"] = "the run diverged"
                self.outcome = Outcome(Status.DIVERGED, diverged)
                return
        self._score()
        self.outcome = COMPLETED

    def close(self) -> Outcome:
        """Records the outcome and lets go of the folder."""
        assert self.outcome is not None
        with self.folder:
            if self.training is not None:
                self.training.close()
            self._finally.close()
            self.gathered.note_load("after")
            self._gather_memory()
            result = self._result(self.outcome)
            # The result comes last: who is killed here is done again, and a run with a result has its card.
            write_cards(self.folder.path, self.folder.header, result)
            self.folder.write_result(result)
            if result.status.is_final:
                self.folder.drop_checkpoints()
            self.watcher.run_finished(self.folder.header, self.folder.path, result)
        return self.outcome

    @contextlib.contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Time and memory of a phase under the run's own keys, where they are its own."""
        with self.gathered.timed(phase), self._meter.phase(phase):
            yield

    @property
    def meter(self) -> MemoryMeter | Unmeasured:
        """Of memory; of a run with a share in a cohort it measures nothing and says why."""
        return self._meter

    def _training(self) -> Training:
        training = Training(
            self.job,
            self.folder,
            self.gathered,
            self.base,
            self.attached,
            self._tokens.train,
            watcher=self.watcher,
            checkpoint_seconds=self._desk.checkpoint_seconds,
        )
        if self._desk.stopping.rule != "off":
            self.contestant = Contestant(
                training.member,
                self.attached.model,
                self._tokens.heldout.examples,
                evaluation=self.job.trial.evaluation,
                stopping=self._desk.stopping,
                rivals=self._desk.rivals(self.job),
            )
        return training

    def _attached(self, base: LoadedBase) -> Attached:
        job, restorer = self.job, self.bench.restorer
        steps = steps_of(job.trial, len(self._rows.train))
        attached = attach(
            base.model,
            job.trial,
            tokenizer=base.tokenizer,
            steps=None if steps is None else steps.steps,
            probabilities=restorer.layer_probabilities(job.trial, job.identities),
        )
        restorer.start_adapter(job.trial, job.identities, attached.model)
        return attached

    def _score(self) -> None:
        self.watcher.phase(self.run_id, "scoring")
        with self.measured("evaluate"):
            scores = score_model(
                self.attached.model,
                self.base.tokenizer,
                self._tokens.heldout.examples,
                self._rows.heldout,
                self.job.trial,
                cache=self.bench.cache,
                output=self.folder.eval_folder,
                progress=lambda read, total: self.watcher.phase(self.run_id, f"scoring: {read / total:.0%}"),
            )
        self.gathered.metrics |= scores.metrics
        self.gathered.missing |= scores.missing
        self.gathered.facts["evaluation"] = scores.facts
        warn_about_limit(self.gathered, self.job.trial.evaluation)
        reasons = dict.fromkeys(call["why_stock"] for call in scores.facts.get("engine", ()) if "why_stock" in call)
        self.gathered.warnings += [f"scored by lm-eval's own engine, not the tree: {reason}" for reason in reasons]

    def _gather_memory(self) -> None:
        self.gathered.measurements |= self._meter.measurements
        self.gathered.missing |= self._meter.missing
        if self.shared is not None:
            self.shared.gather(self.run_id, self.gathered)

    def _result(self, outcome: Outcome) -> Result:
        job, gathered, folder = self.job, self.gathered, self.folder
        measurements = dict(gathered.measurements)
        return Result(
            schema_version=1,
            numerics_version=NUMERICS_VERSION,
            run_id=folder.run_id,
            fingerprint=job.fingerprint,
            setting=job.setting,
            repeat=job.repeat,
            attempt=folder.attempt,
            status=outcome.status,
            reason=outcome.reason,
            started_at=self._started_at,
            finished_at=utc_now(),
            trainable_parameters=_count(measurements.pop("trainable_parameters", None)),
            total_parameters=_count(measurements.pop("total_parameters", None)),
            predicted_peak_allocated_bytes=_count(measurements.pop("predicted_peak_allocated_bytes", None)),
            metrics=gathered.metrics,
            measurements=measurements,
            facts=gathered.facts | {"warnings": gathered.warnings},
            missing=gathered.missing,
        )


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)
