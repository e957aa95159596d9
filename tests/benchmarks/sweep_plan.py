"""What `sweep_speed` runs: the trials, and how each side is asked for them.

Micro-batch 2 is where the goals of the benchmark are stated: steps of 8 rows in pieces of 2 are what somebody does
whose machine holds no more at once. The Trainer alone would gain from larger pieces (`train_speed` says how much); ours
puts the pieces of several trials together instead, which is what is measured here. `--micro-batch 8` runs the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from lora_lab.app.compose import Composer, config_loader
from lora_lab.data.encode import encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.models.load import model_folder
from lora_lab.schema.trial import LAB_KEYS, Trial, read_trial
from tests.benchmarks.train_rows import base_of
from tests.benchmarks.train_trainer import examples_of

# The six tasks of a well-known LoRA study; conf/evaluation/published.yaml names its source.
TASKS = "published"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)


@dataclass(frozen=True, slots=True)
class Run:
    """One trial: rank 8 on q and v, all else equal."""

    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The key of its results."""
        return f"learning_rate={self.learning_rate:g} seed={self.seed}"


@dataclass(frozen=True, slots=True)
class Sweep:
    """rates x seeds trials of `steps` steps of `batch` rows. questions: per task; None: no task, held-out rows."""

    rates: Sequence[float]
    seeds: int
    steps: int
    questions: int | None
    model: str = "smollm2_135m"
    batch: int = 8
    micro_batch: int = 2
    heldout: bool = False

    def runs(self) -> list[Run]:
        """In the order in which either side is given them."""
        return [Run(rate, seed) for rate in self.rates for seed in range(self.seeds)]

    def fixed(self, mirror: Path | None) -> list[str]:
        """Overrides of the lab that all trials share. What the other side does not do (sample answers, held-out rows,
        W&B logs) is off."""
        scored = ["evaluation=heldout"] if self.questions is None else self._tasks(mirror)
        return [
            f"model={self.model}",
            f"training.max_steps={self.steps}",
            f"training.batch_size={self.batch}",
            f"training.micro_batch_size={self.micro_batch}",
            *scored,
            f"evaluation.heldout={str(self.heldout).lower()}",
            "evaluation.answers.rows=0",
        ]

    def _tasks(self, mirror: Path | None) -> list[str]:
        return [f"evaluation={TASKS}", f"evaluation.limit={self.questions}", f"evaluation.mirror={mirror}"]

    def swept(self) -> list[str]:
        """The axes, as `lora-lab run -m` takes them."""
        rates = ",".join(f"{rate:g}" for rate in self.rates)
        return [f"learning_rate={rates}", f"seed={','.join(map(str, range(self.seeds)))}"]

    def trial(self, run: Run, mirror: Path | None) -> Trial:
        """The lab's own view of one of the trials."""
        loader = config_loader()
        composer = Composer(loader, loader.load_configuration("config", [], RunMode.RUN))
        lines = [*self.fixed(mirror), f"learning_rate={run.learning_rate:g}", f"seed={run.seed}"]
        mapping = composer.compose(lines).mapping
        return read_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS})

    def facts(self) -> dict[str, Any]:
        """For the results."""
        return {**asdict(self), "rates": list(self.rates)}


FULL = Sweep(RATES, seeds=2, steps=40, questions=100)
QUICK = Sweep(RATES[:2], seeds=1, steps=4, questions=10)
# Training alone: how time grows with the number of trials.
GROWTH = Sweep(RATES, seeds=8, steps=10, questions=None, heldout=True)
TRIALS = (1, 2, 4, 8, 16, 32)
QUICK_TRIALS = (1, 2)


def of_trials(sweep: Sweep, trials: int) -> Sweep:
    """As many trials of the kind; more than there are rates get further seeds.

    Raises:
        ValueError: the number is neither at most that of the rates nor a multiple of it.
    """
    rates = sweep.rates[:trials]
    if trials < 1 or trials % len(rates):
        raise ValueError(f"expected at most {len(sweep.rates)} trials or a multiple of it, got {trials}")
    return replace(sweep, rates=rates, seeds=trials // len(rates))


def rows_as_tokens(trial: Trial, cache: Path) -> tuple[Path, list[dict[str, list[int]]]]:
    """The base's folder and the training rows as a Trainer takes them."""
    base = base_of(trial, cache)
    rows = load_rows(trial.data, cache=cache).train
    encoded = encode_rows(rows, base.tokenizer, trial.data, vocab_size=base.model.config.vocab_size)
    return model_folder(trial.model, cache), examples_of(encoded.examples)
