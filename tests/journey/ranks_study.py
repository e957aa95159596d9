"""A small study with one claim of most kinds, on the tiny model, and the calls that reproduce it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.journey.program import Answer, Lab, call

STUDY = """\
question: Does the rank matter on the smallest model?
source: {title: A paper, url: "https://example.org"}
base:
  model: tiny_random
  data: skills
  data.train_size: 16
  data.heldout_size: 8
  training.batch_size: 4
  training.micro_batch_size: 4
  training.max_steps: 2
  evaluation: heldout
  evaluation.answers.rows: 0
  scheduler: constant
seeds: [0, 1, 2]
grids:
  - {rank: [2, 8], target: [qv], learning_rate: [1.0e-2, tuned]}
metrics: [heldout/loss]
arms:
  small: {rank: 2}
  large: {rank: 8}
tuning:
  metric: heldout/loss
  seeds: [100]
  base: {data.heldout_seed: 12}
  rates: [{values: [1.0e-4, 1.0e-3, 1.0e-2]}]
timing:
  arms: [small, large]
  repeats: 3
  base: {training.max_steps: 3, evaluation: none}
claims:
  - id: bigger
    statement: Rank 8 learns more than rank 2 does.
    rule: superiority
    metric: heldout/loss
    arm: large
    against: small
    claimed: lower
    smallest_difference: 0.001
    forms: [as_published, tuned]
  - id: equal
    statement: They are nearly the same.
    rule: equality
    metric: heldout/loss
    arm: large
    against: small
    margin: 3.0
  - id: slower
    statement: Rank 8 takes at most a hundred times as long.
    rule: ratio
    measure: train_seconds
    arm: large
    against: small
    high: 100
  - id: four_times
    statement: Rank 8 trains four times as many parameters.
    rule: exact
    value: planned(trainable_parameters, large) / planned(trainable_parameters, small)
    low: 4
    high: 4
  - {id: judged_elsewhere, statement: A judge prefers rank 8., rule: not_runnable, reason: there is no judge model here}
"""


def housekeeping(folder: Path, cache: Path) -> list[str]:
    """Overrides of a call below `folder`."""
    return [f"root='{folder / 'lab'}'", f"cache='{cache}'", "tracking=off"]


class Study:
    """The study in a working folder of the test's own."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.file = folder / "sweeps" / "ranks.yaml"
        self.lab = Lab(folder / "lab", cache)

    def reproduce(self, *arguments: str) -> Answer:
        """`reproduce ranks`."""
        return call("reproduce", "ranks", *arguments, *housekeeping(self.folder, self.cache))

    def edit(self, old: str, new: str) -> None:
        """Changes the study's file."""
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))

    def of(self, name: str) -> Any:
        """A file of the study's folder."""
        return json.loads((self.lab.root / "studies" / "ranks" / name).read_text())

    def ids(self, stage: str) -> list[str]:
        """Runs of a stage, each once."""
        return list(dict.fromkeys(one["run_id"] for one in self.of("points.json")["points"] if one["stage"] == stage))


def said(answer: Answer) -> dict[tuple[str, str | None], str]:
    """Claim and form -> decision."""
    return {(one["claim"], one["form"]): one["decision"] for one in answer.json()["verdicts"]}


def begun(folder: Path, cache: Path) -> Study:
    """The study before anything, its file below `folder`."""
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "ranks.yaml").write_text(STUDY)
    return Study(folder, cache)
