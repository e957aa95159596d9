"""Sweeps that are killed at any moment of their life: nothing is lost, nothing runs twice, nothing becomes different.

`make test-kills` gives each of three sweeps its share of KILLS=20 (or any number). Every test run kills one sweep, in
test_sweep.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from tests.journey.program import Answer, call, single_thread
from tests.kill_loop import Kill, Moment, SweepFolder, kill_once, living
from tests.sweep_checks import (
    Files,
    changes,
    damages,
    differences,
    files_of,
    precision_by_setting,
    result_of,
    resumable,
    tables_apart,
)

_START = """\
question: Does this sweep survive?
base:
  model: tiny_random
  data.train_size: 48
  data.heldout_size: 8
  evaluation: heldout
  evaluation.answers.rows: 1
  evaluation.answers.max_new_tokens: 4
  training.batch_size: 4
  training.micro_batch_size: 4
  training.precision: fp64
  target: all_linear
  dropout: 0.1
"""
# Ranks, lengths, optimizers and accumulation mixed; a 4-bit base, a GPT-2; one that diverges; one that is not fused.
_SMALL = f"""{_START}
grids:
  - {{zip: {{rank: [1, 4, 16], training.max_steps: [12, 30, 21]}}}}
  - {{zip: {{optimizer: [sgd, adamw], training.micro_batch_size: [1, 4]}}, training.precision: [fp32]}}
  - {{optimizer: [sgd], learning_rate: [1.0e+30], target: [head], training.precision: [fp32]}}
  - {{quantization: [nf4], training.precision: [fp32], training.max_steps: [9]}}
  - {{model.shape.family: [gpt2], model.shape.num_kv_heads: [4]}}
  - {{method: [adalora], rank: [4], method.initial_rank: [6]}}
"""
_LORAS = f"""{_START}
seeds: [0, 1]
grids:
  - {{zip: {{rank: [1, 2, 5, 16], training.max_steps: [24, 50, 31, 40]}}}}
  - {{zip: {{optimizer: [sgd, adamw, sgd], training.micro_batch_size: [1, 4, 2]}}, training.precision: [fp32, fp64]}}
  - {{method: [rslora, dora, lora_plus, ia3], training.max_steps: [20]}}
  - {{optimizer: [sgd], learning_rate: [1.0e+30], target: [head], training.precision: [fp32]}}
"""
_BASES = f"""{_START}
seeds: [0, 1]
grids:
  - {{quantization: [nf4], training.precision: [fp32], zip: {{rank: [2, 16], training.max_steps: [24, 50]}}}}
  - {{quantization: [nf4], training.precision: [fp32], optimizer: [sgd], training.micro_batch_size: [1]}}
  - {{model.shape.family: [gpt2], model.shape.num_kv_heads: [4], rank: [1, 8], training.precision: [fp32, fp64]}}
  - {{model.shape.tied_embeddings: [true], rank: [4], training.micro_batch_size: [1, 4]}}
  - {{evaluation.tasks: [[skills_trained]], evaluation.skills.documents: [8], rank: [3]}}
"""
_METHODS = f"""{_START}
seeds: [0]
grids:
  - {{method: [lora, pissa, olora, molora, bottleneck, prefix_tuning, full], training.max_steps: [20]}}
  - {{method: [mola], method.experts: [[2, 3]], rank: [4]}}
  - {{method: [adalora], rank: [4], method.initial_rank: [6]}}
  - {{method: [lisa], method.layers: [1], method.interval: [2]}}
  - {{method: [full], optimizer: [sophia]}}
  - {{method: [galore], rank: [4]}}
"""
_STUDIES = {"loras": _LORAS, "bases": _BASES, "methods": _METHODS}
# Kills that one sweep meets before it is let finish, so that all parts of its life see some.
_KILLS_PER_SWEEP = 5
_SEED = 20


@dataclass(frozen=True)
class Known:
    """What this version of the program can do."""

    launch: frozenset[str]

    @property
    def resumes(self) -> bool:
        """Whether runs are gone on with from checkpoints."""
        return "checkpoint_seconds" in self.launch

    @property
    def has_cohorts(self) -> bool:
        """Whether trials may be trained together."""
        return "cohort" in self.launch


@pytest.fixture(scope="module")
def known() -> Known:
    """Asked of the configuration itself."""
    answer = call("run", "--cfg", "job")
    assert answer.code == 0, answer.err
    return Known(frozenset(yaml.safe_load(answer.out)["launch"]))


@dataclass
class Story:
    """A sweep that was killed some times and then let finish, and what was seen on the way."""

    folder: SweepFolder
    kills: list[Kill] = field(default_factory=list)
    seen: dict[str, Files] = field(default_factory=dict)  # of finished runs, as they were when first seen
    left: dict[str, tuple[int, int] | None] = field(default_factory=dict)  # of others, to go on from
    final: Answer | None = None

    def look(self) -> None:
        """After a kill: nobody holds a run; what is finished is remembered, and what others can go on from."""
        for record in self.folder.runs():
            assert record.state != "RUNNING", f"{record.name} is held by {record.owner} after the kill"
            if record.is_done:
                self.seen.setdefault(record.run_id, files_of(record.folder))
            else:
                self.left[record.run_id] = resumable(record)


def _told(folder: Path, cache: Path, study: str, known: Known) -> Story:
    overrides = ("launch.checkpoint_seconds=0",) if known.resumes else ()
    sweep = SweepFolder(folder, cache, "kills", overrides)
    sweep.write_study(study)
    return Story(sweep)


def killed_sweep(story: Story, moments: Sequence[Moment], draw: random.Random) -> Story:
    """Kills the sweep at each of `moments` in turn, then lets it finish. Fewer kills where it is finished before."""
    for number, moment in enumerate(moments, start=1):
        outcome = kill_once(story.folder, moment, draw, f"life{number}")
        if isinstance(outcome, Answer):
            story.final = outcome
            return story
        story.kills.append(outcome)
        story.look()
    with living(story.folder, "last") as life:
        story.final = life.answer()
    return story


def undisturbed(folder: Path, cache: Path, study: str, *overrides: str) -> tuple[Answer, list[RunRecord]]:
    """The same sweep, in this process."""
    sweep = SweepFolder(folder, cache, "kills", overrides)
    sweep.write_study(study)
    with contextlib.chdir(folder), single_thread():
        answer = call(*sweep.command)
    assert answer.code in (0, 3), answer.err
    assert not list(sweep.root.glob("runs/*/checkpoint")), "of finished runs"
    return answer, sweep.runs()


def check(story: Story, reference: tuple[Answer, list[RunRecord]], known: Known) -> None:
    """All that must be true of a sweep that was killed and begun again."""
    assert story.final is not None and "Traceback" not in story.final.err, story.final
    records = story.folder.runs()
    answer, expected = reference
    assert story.final.code == answer.code, story.final.err
    by_id = {record.run_id: record for record in expected}
    assert sorted(record.run_id for record in records) == sorted(by_id)
    assert all(record.is_done for record in records), [(record.name, record.state) for record in records]

    assert [problem for record in records for problem in damages(record)] == []
    touched = {
        record.name: changes(story.seen[record.run_id], files_of(record.folder))
        for record in records
        if record.run_id in story.seen
    }
    assert {name: files for name, files in touched.items() if files} == {}, "finished before a kill, touched after it"
    for record in records:
        attempts = sorted(int(path.name) for path in (record.folder / "attempts").glob("*"))
        assert attempts == list(range(1, result_of(record).attempt)), record.name
        assert len(attempts) <= len(story.kills)
        assert not list((record.folder / "attempts").glob("*/result.json")), "it had a result before"

    assert [problem for record in records for problem in differences(record, by_id[record.run_id])] == []
    assert tables_apart(story.final.json(), answer.json(), precision_by_setting(expected)) == []
    if known.resumes:
        _check_resumed(story, records)
    _check_later_call(story, records)


def _check_resumed(story: Story, records: Sequence[RunRecord]) -> None:
    """Who left a checkpoint went on from the last of them, and lost at most the step that was under way."""
    for record in records:
        said = result_of(record).facts.get("resumed")
        left = story.left.get(record.run_id)
        if left is None:
            assert said is None, f"{record.name}: resumed from nothing: {said}"
            continue
        attempt, steps = left
        assert said is not None, f"{record.name}: attempt {attempt} left a checkpoint that was not used"
        assert said["attempt"] == attempt, f"{record.name}: {said}, and attempt {attempt} left the last checkpoint"
        assert steps - 1 <= said["step"] <= steps, f"{record.name}: {steps} steps were logged, resumed at {said}"


def _check_later_call(story: Story, records: Sequence[RunRecord]) -> None:
    before = {record.run_id: files_of(record.folder) for record in records}
    with contextlib.chdir(story.folder.path):
        again = call(*story.folder.command)
    assert story.final is not None and again.code == story.final.code
    assert "nothing to run" in again.err
    assert again.json() == story.final.json()
    assert {record.run_id: files_of(record.folder) for record in story.folder.runs()} == before


@pytest.mark.slow
def test_three_kills(tmp_path: Path, tiny_cache: Path, known: Known) -> None:
    alone = ("launch.cohort=off",) if known.has_cohorts else ()
    (tmp_path / "alone").mkdir()
    reference = undisturbed(tmp_path / "alone", tiny_cache, _SMALL, *alone)
    assert [record.state for record in reference[1]].count(Status.DIVERGED) == 1
    story = _told(tmp_path / "killed", tiny_cache, _SMALL, known)
    killed_sweep(story, (Moment.TRAINING, Moment.SAVING, Moment.SCORING), random.Random(_SEED))
    assert len(story.kills) == 3
    check(story, reference, known)


@pytest.mark.slow
@pytest.mark.parametrize("name", _STUDIES)
def test_many_kills(tmp_path: Path, tiny_cache: Path, known: Known, name: str) -> None:
    study = _STUDIES[name]
    wanted = math.ceil(int(os.environ.get("KILLS", "20")) / len(_STUDIES))
    alone = ("launch.cohort=off",) if known.has_cohorts else ()
    (tmp_path / "alone").mkdir()
    reference = undisturbed(tmp_path / "alone", tiny_cache, study, *alone)
    if known.has_cohorts:
        (tmp_path / "together").mkdir()
        answer, records = undisturbed(tmp_path / "together", tiny_cache, study)
        by_id = {record.run_id: record for record in reference[1]}
        assert [problem for record in records for problem in differences(record, by_id[record.run_id])] == []
        assert tables_apart(answer.json(), reference[0].json(), precision_by_setting(records)) == []
        assert "cohort" in {result_of(record).facts["executed"] for record in records}
    draw = random.Random(f"{_SEED} {name}")
    kills: list[Kill] = []
    deck = itertools.cycle(draw.sample(list(Moment), len(Moment)))
    for number in itertools.count(1):
        story = _told(tmp_path / f"killed{number}", tiny_cache, study, known)
        moments = [
            next(moment for moment in deck if known.resumes or moment is not Moment.CHECKPOINT)
            for _ in range(min(_KILLS_PER_SWEEP, wanted - len(kills)))
        ]
        killed_sweep(story, moments, draw)
        check(story, reference, known)
        assert story.kills, "the sweep ended before it could be killed"
        kills += story.kills
        print(*(f"{kill.moment} at {kill.seconds:.2f} s left {kill.left}" for kill in story.kills), sep="\n")
        if len(kills) >= wanted:
            break
    if wanted >= _KILLS_PER_SWEEP:
        left = {state for kill in kills for state in kill.left}
        assert "training" in left and left & {"saving", "scoring"}, f"the kills met too little: {kills}"
