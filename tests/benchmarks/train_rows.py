"""What `train_speed` runs: models, targets and micro-batches, and the trials of each side, on rows of `skills`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from lora_lab.app.compose import Composer, config_loader
from lora_lab.data.encode import Encoded, encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.schema.trial import LAB_KEYS, Trial, read_trial

# Rows of a step, whatever the micro-batch: the smaller one is the same training in less memory.
BATCH = 8
_STEPS = 1000  # of the schedule; a benchmark takes the first few

# Llama-3.2-1B's shape with 4 of its 16 layers, so that it fits beside others; the vocabulary is the whole one.
_LLAMA_1B = {
    "hidden_size": 2048,
    "num_layers": 4,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 64,
    "mlp_size": 8192,
    "vocab_size": 128256,
    "max_positions": 4096,
    "tied_embeddings": "true",
}


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A base. read_by: overrides of the model whose tokenizer reads the rows; of None its own does."""

    name: str
    overrides: Sequence[str]
    read_by: Sequence[str] | None = None


MODELS = {
    row.name: row
    for row in (
        ModelRow("smollm2_135m", ("model=smollm2_135m",)),
        ModelRow(
            "llama_1b_4_layers",
            (
                "model=tiny_random",
                "model.name=llama_1b_4_layers",
                *(f"model.shape.{key}={value}" for key, value in _LLAMA_1B.items()),
            ),
            # A random model has a byte tokenizer, whose rows would be four times as long as those of any real one.
            read_by=("model=smollm2_135m",),
        ),
        ModelRow("tiny_random", ("model=tiny_random",)),
    )
}
TARGETS = ("qv", "all_linear")
MICRO_BATCHES = (1, 2, 8)
COHORTS = (2, 4, 8, 16)
# trl: as it comes, with gradient checkpointing; trl_kept: without, as all others are.
RIVALS = ("trainer", "trl", "trl_kept")
# End the name of a side of the lab's that is compiled; `train_compile` says how.
LAYERS_COMPILED, PARTS_COMPILED = "_layers_compiled", "_parts_compiled"
COMPILED = (LAYERS_COMPILED, PARTS_COMPILED)
SIDES = (*RIVALS, "solo", *(f"cohort_{members}" for members in COHORTS))


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. batch: rows of a step of one run, in pieces of micro_batch rows."""

    model: str
    target: str
    micro_batch: int
    batch: int = BATCH

    @property
    def name(self) -> str:
        """A short one, the key of the results."""
        return f"{self.model} {self.target} {self.micro_batch}"

    def trials(self, members: int) -> list[Trial]:
        """Runs that differ in seed alone: other initial weights and another order of the rows."""
        return [_trial(self, seed) for seed in range(members)]


def members_of(side: str) -> int:
    """Runs that a side trains at once."""
    return int(side.removeprefix("cohort_").partition("_")[0]) if side.startswith("cohort_") else 1


def chosen_cases(models: Sequence[str], targets: Sequence[str], micro_batches: Sequence[int]) -> list[Case]:
    """Every combination.

    Raises:
        ValueError: a name that is none of the benchmark's, or a micro-batch that does not divide the batch.
    """
    wrong = [f"{name} (of {', '.join(MODELS)})" for name in models if name not in MODELS]
    wrong += [f"{name} (of {', '.join(TARGETS)})" for name in targets if name not in TARGETS]
    wrong += [f"{size} (divides {BATCH})" for size in micro_batches if size < 1 or BATCH % size]
    if wrong:
        raise ValueError(f"not of this benchmark: {'; '.join(wrong)}")
    return [Case(model, target, size) for model in models for target in targets for size in micro_batches]


def base_of(trial: Trial, cache: Path) -> LoadedBase:
    """The trial's base in float32 on the CPU."""
    return load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=cache)


def tokenizer_of(case: Case, cache: Path) -> Any:
    """The tokenizer that reads the rows, with a pad token."""
    return base_of(_trial(case, 0, read=True), cache).tokenizer


def rows_of(case: Case, tokenizer: Any, cache: Path) -> list[Encoded]:
    """The training rows as tokens, the same for every side."""
    trial = _trial(case, 0)
    shape: Any = trial.model.shape
    rows = load_rows(trial.data, cache=cache).train
    return list(encode_rows(rows, tokenizer, trial.data, vocab_size=shape.vocab_size).examples)


def _trial(case: Case, seed: int, *, read: bool = False) -> Trial:
    row = MODELS[case.model]
    overrides = row.read_by if read and row.read_by is not None else row.overrides
    mapping = (
        _composer()
        .compose(
            [
                *overrides,
                f"target={case.target}",
                f"training.max_steps={_STEPS}",
                f"training.batch_size={case.batch}",
                f"training.micro_batch_size={case.micro_batch}",
                f"seed={seed}",
            ]
        )
        .mapping
    )
    return read_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS})


@remembered
def _composer() -> Composer:
    loader = config_loader()
    return Composer(loader, loader.load_configuration("config", [], RunMode.RUN))
