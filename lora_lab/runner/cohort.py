"""A cohort: runs that share a frozen base take seats, are trained in common passes, and leave one by one.

As a seat falls free the next run of the queue takes it. Each run has a folder, a log, an optimizer and an end of its
own: one that diverges, fails or is through leaves the others exactly as they were, and is saved, scored and recorded
before training goes on.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterable, Sequence

from lora_lab.errors import MachineError
from lora_lab.memory.meter import memory_now
from lora_lab.plan.job import Job
from lora_lab.record.result import Status
from lora_lab.record.watcher import CohortMember, CohortView
from lora_lab.runner.alone import let_go, together_on
from lora_lab.runner.desk import Desk
from lora_lab.runner.outcome import Outcome, is_out_of_memory
from lora_lab.runner.run import Run
from lora_lab.runner.seats import MemoryBudget
from lora_lab.runner.shared_cost import SharedCost
from lora_lab.runner.training import Training
from lora_lab.train.forward import Together
from lora_lab.train.loop import tick
from lora_lab.train.member import Member, StepRecord

# Between two looks at a cohort that nobody has joined or left.
_SHOW_SECONDS = 0.5


class Cohort:
    """jobs: of one base, which may share passes. seats: how many at once. held: those that another process has."""

    def __init__(self, cohort_id: str, jobs: Iterable[Job], seats: int, desk: Desk, budget: MemoryBudget) -> None:
        self.queue = deque(jobs)
        self.held: list[Job] = []
        self._seats, self._desk, self._budget = seats, desk, budget
        self._shared = SharedCost(cohort_id, seats, desk.bench.device)
        self._forward: Together | None = None
        self._seated: list[Run] = []
        self._waiting: Run | None = None
        self._closed = False
        self._per_pass = seats
        self._shown: list[str] = []
        self._shown_at = 0.0

    def run(self) -> None:
        """Runs all jobs that can be claimed.

        Raises:
            KeyboardInterrupt, MachineError: after every seated run has been recorded as interrupted.
        """
        try:
            self._run()
        except BaseException as error:
            self._interrupt(error)
            raise

    def _run(self) -> None:
        self._fill()
        while self._seated:
            self._show()
            self._compare()
            self._advance()
            for run in [one for one in self._seated if one.outcome is not None or not _training(one).member.is_active]:
                self._leave(run)
            self._fill()

    def _compare(self) -> None:
        """Where a search ends who falls behind: all who stand at a point are evaluated before the first is judged."""
        for phase in (Run.evaluate_point, Run.judge):
            for run in self._seated:
                if run.outcome is None:
                    run.attempt(functools.partial(phase, run))

    def _show(self) -> None:
        """Tells the watcher, after each change of who is seated and else twice a second."""
        seated = [run.run_id for run in self._seated]
        if seated == self._shown and time.monotonic() - self._shown_at < _SHOW_SECONDS:
            return
        self._shown, self._shown_at = seated, time.monotonic()
        memory_key, memory_bytes = next(iter(memory_now(self._desk.bench.device).items()))
        view = CohortView(
            members=tuple(_shown(run) for run in self._seated),
            seats=self._seats,
            waiting=len(self.queue) + (self._waiting is not None),
            tokens_per_second=self._shared.tokens_per_second,
            memory_key=memory_key,
            memory_bytes=memory_bytes,
        )
        self._desk.watcher.cohort(self._shared.cohort_id, view)

    def _fill(self) -> None:
        """Seats runs until seats, memory or jobs are used up."""
        while len(self._seated) < self._seats:
            run = self._waiting or self._next()
            self._waiting = None
            if run is None:
                return
            if self._seated and not self._budget.has_room(run.run_id):
                self._waiting = run
                return
            self._seated.append(run)

    def _next(self) -> Run | None:
        """The next run that is ready to train; those without a training are done on the way."""
        while self.queue and not self._closed:
            job = self.queue.popleft()
            folder = self._desk.claim(job)
            if folder is None:
                self.held.append(job)
                continue
            run = Run(job, folder, self._desk, shared=self._shared)
            if run.attempt(run.prepare) and run.training is not None and run.attempt(lambda: self._join(run)):  # noqa: B023
                return run
            self._end(run)
        return None

    def _join(self, run: Run) -> None:
        """Seats a prepared run on the trunk, and measures what it needs."""
        training = _training(run)
        if self._forward is None:
            self._forward = together_on(run.job, self._desk.bench)
        training.note_rows("end to end")
        self._forward.trunk.join(run.run_id, training.attached.model)
        probe = training.probe(self._forward)
        self._budget.note(run.run_id, probe.peak_bytes - int(run.gathered.measurements["frozen_weight_bytes"]))
        run.gathered.measurements["gradient_bytes"] = probe.gradient_bytes
        if self._desk.bench.device.type != "cuda":
            run.gathered.measurements["peak_allocated_bytes"] = probe.peak_bytes
        self._shared.join(run.run_id)
        training.begin(self._desk.bench.device)

    def _advance(self) -> None:
        """A micro-batch of all who are seated, in one pass, or in several where one was too much for the memory.

        Who goes on from its last step (it was killed while it was scored) has nothing left to do but to leave.
        """
        self._pass([run for run in self._seated if run.outcome is None and _training(run).member.is_active])

    def _pass(self, runs: Sequence[Run]) -> None:
        """Where a pass fails each run goes on by itself, and who fails then has failed; out of memory, in halves."""
        size = self._per_pass
        for start in range(0, len(runs), size):
            group = runs[start : start + size]
            failed = self._failure(group)
            if failed is None:
                continue
            for run in group:
                _training(run).member.abandon_step()
            let_go(self._desk.bench.device)
            if failed == Status.OUT_OF_MEMORY and len(group) > 1:
                self._per_pass = -(-len(group) // 2)
                self._pass(group)
                continue
            for run in group:
                run.attempt(functools.partial(self._step_alone, run))
                _raise_stop(run)

    def _step_alone(self, run: Run) -> None:
        """To the end of a step: what fails at its last micro-batch would not be seen before."""
        self._tick([run])
        while run.outcome is None and _training(run).member.open_step is not None:
            self._tick([run])

    def _failure(self, group: Sequence[Run]) -> Status | None:
        """Of a pass of these runs; None where it went well. What had failed is let go of when this returns."""
        try:
            self._tick(group)
        except MachineError:
            raise
        except Exception as error:  # noqa: BLE001 - whose fault it was shows when each is alone
            return Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.FAILED
        return None

    def _tick(self, runs: Sequence[Run]) -> None:
        by_id = {run.run_id: run for run in runs}

        def on_step(member: Member, record: StepRecord) -> None:
            """What fails in the log of one is its own failure."""
            run = by_id[member.name]
            run.attempt(lambda: _training(run).on_step(record))

        assert self._forward is not None
        start = time.perf_counter()
        with self._shared.meter.phase("train", is_short=True):
            members = [_training(run).member for run in runs]
            tokens = tick(self._forward, members, on_step=on_step, timed=False)
        self._shared.note_tick(list(by_id), seconds=time.perf_counter() - start, tokens=tokens)
        for run in runs:
            _raise_stop(run)

    def _leave(self, run: Run) -> None:
        """Takes a run off the trunk, saves, scores and records it."""
        self._seated.remove(run)
        self._unseat(run)
        if run.outcome is None:
            run.attempt(run.complete)
        self._end(run)

    def _unseat(self, run: Run) -> None:
        if self._forward is not None and run.run_id in self._forward.trunk.members:
            self._forward.trunk.leave(run.run_id)
        self._budget.free(run.run_id)

    def _end(self, run: Run) -> None:
        """Records a run that is not seated; one without a training is scored first."""
        if run.outcome is None:
            run.attempt(run.complete)
        self._unseat(run)
        ended = run.close()
        self._closed = self._desk.is_last(run.job, ended.status, self.queue)
        let_go(self._desk.bench.device)
        _raise_stop(run)

    def _interrupt(self, error: BaseException) -> None:
        """Records all who are seated when the process cannot go on."""
        why = "interrupted (Ctrl-C)" if isinstance(error, KeyboardInterrupt) else f"the cohort was stopped: {error}"
        for run in [*self._seated, *([] if self._waiting is None else [self._waiting])]:
            if run.outcome is None:
                run.outcome = Outcome(Status.INTERRUPTED, why)
            run.close()
        self._seated, self._waiting = [], None


def _shown(run: Run) -> CohortMember:
    member = _training(run).member
    loss = member.records[-1].loss if member.records else None
    return CohortMember(run.run_id, run.job.name, member.step, member.total_steps, loss)


def _raise_stop(run: Run) -> None:
    """Where what ended the run ends the sweep as well."""
    if run.outcome is not None and run.outcome.stop is not None:
        raise run.outcome.stop


def _training(run: Run) -> Training:
    assert run.training is not None
    return run.training
