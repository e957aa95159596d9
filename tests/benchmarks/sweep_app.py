"""The other side of `sweep_speed`: one run of a sweep as it is written by hand, with Hydra, Trainer, PEFT and lm-eval.

    python -m tests.benchmarks.sweep_app learning_rate=1e-3 seed=0 folder=... rows=... tasks=... output=...

Rows are read as tokens and tasks from files that are there already, so that neither tokenising nor lm-eval's index of
all its tasks (12 to 18 seconds) is in its time.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

SIX_TASKS = (
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "blimp_causative",
    "mmlu_global_facts",
    "arithmetic_2ds",
    "arithmetic_4ds",
)


@dataclass
class AppConfig:
    """folder: of the base. rows: a JSON file of tokens and labels. tasks: a folder of task files. questions: per task.
    output: gets the adapter and `run.json`."""

    learning_rate: float = 1e-3
    seed: int = 0
    rank: int = 8
    alpha: float = 16
    target: str = "qv"
    steps: int = 40
    batch: int = 8
    micro_batch: int = 2
    questions: int = 100
    eval_batch: int = 16
    folder: str = MISSING
    rows: str = MISSING
    tasks: str = MISSING
    output: str = MISSING


ConfigStore.instance().store(name="sweep_app", node=AppConfig)


@hydra.main(version_base="1.3", config_path=None, config_name="sweep_app")  # type: ignore[untyped-decorator]
def main(config: AppConfig) -> None:
    """Trains, saves the adapter, scores it."""
    begin = time.perf_counter()
    output = Path(config.output)
    seconds: dict[str, float] = {}
    loss = _train(config, output / "adapter", seconds, begin)
    start = time.perf_counter()
    metrics = _score(config, output / "adapter")
    seconds["score"] = time.perf_counter() - start
    (output / "run.json").write_text(
        json.dumps({"seconds_of": seconds, "train_loss": loss, "metrics": metrics}, indent=2)
    )


def _train(config: AppConfig, adapter: Path, seconds: dict[str, float], begin: float) -> float:
    from transformers import AutoTokenizer

    from tests.benchmarks.train_trainer import arguments, plain_model, plain_trainer

    seconds["import"] = time.perf_counter() - begin
    start = time.perf_counter()
    model = plain_model(Path(config.folder), config.target, rank=config.rank, alpha=config.alpha, seed=config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.folder)
    told = arguments(
        adapter.parent / "trainer",
        batch=config.batch,
        micro_batch=config.micro_batch,
        steps=config.steps,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    trainer = plain_trainer(model, tokenizer, json.loads(Path(config.rows).read_text()), told)
    seconds["load"] = time.perf_counter() - start
    start = time.perf_counter()
    result = trainer.train()
    seconds["train"] = time.perf_counter() - start
    model.save_pretrained(adapter)
    return float(result.training_loss)


def _score(config: AppConfig, adapter: Path) -> dict[str, float]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = simple_evaluate(
        model="hf",
        model_args={"pretrained": config.folder, "peft": str(adapter), "dtype": "float32"},
        tasks=list(SIX_TASKS),
        limit=config.questions,
        batch_size=config.eval_batch,
        device="cpu",
        task_manager=TaskManager(include_path=config.tasks, include_defaults=False),
    )
    return {
        f"{task}/{name.partition(',')[0]}": float(value)
        for task, values in results["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


if __name__ == "__main__":
    main()
