"""The only door to lm-eval: a model object and an `Evaluation` in, metrics and lm-eval's own files out."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.utils import handle_non_serializable
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_lab.errors import EvaluationError, LabError, MachineError, Problem, first_line
from lora_lab.evaluate.guard_note import GuardNote
from lora_lab.evaluate.heldout import scoring_mode
from lora_lab.evaluate.near_ties import near_ties
from lora_lab.evaluate.readings import read_metrics, task_hashes
from lora_lab.evaluate.remembering import NotedTasks, RememberingModel
from lora_lab.evaluate.surroundings import console_to, data_cache, kept_random_state, one_environment_report
from lora_lab.evaluate.tasks import PreparedTasks, prepare_tasks
from lora_lab.evaluate.tree.scores import Progress
from lora_lab.record.atomic import write_json
from lora_lab.record.result import Metric
from lora_lab.schema.evaluation import Evaluation

# lm-eval's own defaults, said explicitly: few-shot examples are drawn with the last one.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@dataclass(frozen=True, slots=True)
class Scores:
    """metrics: `task/metric`, lm-eval's values. missing: name -> why it is absent. facts: what was scored (task
    versions and hashes, few-shot examples, documents, batch size, seeds, lm-eval's version). seconds: wall time."""

    metrics: dict[str, Metric]
    missing: dict[str, str]
    facts: dict[str, Any]
    seconds: float


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: Evaluation,
    *,
    cache: Path,
    output: Path,
    guard_note: GuardNote | None = None,
    progress: Progress = lambda _read, _total: None,
    remember: bool = False,
) -> Scores:
    """Scores `model`, where it is, on the tasks of `evaluation`; held-out rows are not among them (`score_heldout`).

    guard_note: where it is kept that the tree agrees with lm-eval's engine on this base and kind of adapter.
    progress: told after each pass of the tree how many tokens have been read, and of how many.

    `output` (made if need be) gets lm-eval's returned mapping as `results.json`, its samples as `samples_TASK.jsonl`,
    what it printed as `lm_eval.log`, and documents that could turn within rounding as `near_ties.json`. lm-eval's own
    caches are never used: their keys lack limit and data revision. With `remember` answers are looked up and kept in
    `cache` (`RememberingModel`), and the facts say which were.
    Global random state, the model's training flags and the tokenizer are as before afterwards.

    Raises:
        InputError, IdentityError: see `prepare_tasks`.
        EvaluationError: a log-likelihood is not finite, or lm-eval refuses.
    """
    begin = time.perf_counter()
    if not evaluation.tasks:
        return Scores({}, {}, {}, 0.0)
    tasks = prepare_tasks(evaluation, cache=cache)
    output.mkdir(parents=True, exist_ok=True)
    log = output / "lm_eval.log"
    with (
        scoring_mode(model),
        kept_random_state(),
        console_to(log),
        one_environment_report(),
        data_cache(cache, offline=not (tasks.needs_defaults or evaluation.include_path)),
    ):
        lm = RememberingModel(
            model,
            tokenizer=tokenizer,
            batch_size=evaluation.batch_size,
            engine=evaluation.engine,
            chunk_tokens=evaluation.chunk_tokens,
            guard_note=guard_note,
            progress=progress,
            remember_in=cache / "scores" if remember else None,
            about={"limit": evaluation.limit, "num_fewshot": evaluation.num_fewshot, "seeds": SEEDS},
            applies_chat_template=evaluation.apply_chat_template,
        )
        results = _simple_evaluate(lm, tasks, evaluation, log=log)
    _write_files(results, output)
    ties = near_ties(results, lm.allowed)
    write_json(output / "near_ties.json", [asdict(tie) for tie in ties])
    metrics, missing = read_metrics(results, chance=tasks.chance)
    facts = _facts(results, evaluation, lm) | {"near_ties": Counter(f"{tie.task}/{tie.measure}" for tie in ties)}
    return Scores(metrics, missing, facts, time.perf_counter() - begin)


def _simple_evaluate(
    lm: RememberingModel, tasks: PreparedTasks, evaluation: Evaluation, *, log: Path
) -> dict[str, Any]:
    """lm-eval's returned mapping; its errors become ours, naming the log that holds the rest."""
    try:
        manager = NotedTasks(
            lm.note_tasks,
            include_path=[str(folder) for folder in tasks.folders],
            include_defaults=tasks.needs_defaults,
        )
        results: dict[str, Any] = simple_evaluate(
            model=lm,
            tasks=list(tasks.names),
            num_fewshot=evaluation.num_fewshot,
            batch_size=evaluation.batch_size,
            limit=evaluation.limit,
            bootstrap_iters=evaluation.bootstrap_iters,
            apply_chat_template=evaluation.apply_chat_template,
            log_samples=True,
            task_manager=manager,
            **SEEDS,
        )
    except (LabError, MemoryError):
        raise
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(f"the data of a task could not be fetched: {first_line(error)}") from error
    except (ValueError, KeyError, TypeError, AssertionError, ImportError, OSError) as error:
        message = f"lm-eval stopped: {type(error).__name__}: {first_line(error)} (what it printed: {log})"
        raise EvaluationError(Problem("evaluation.tasks", message)) from error
    return results


def _write_files(results: Mapping[str, Any], output: Path) -> None:
    """Results and samples exactly as lm-eval returned them, serialised by its own rules."""
    kept = {key: value for key, value in results.items() if key != "samples"}
    text = json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)
    (output / "results.json").write_text(text, encoding="utf-8")
    for task, samples in results["samples"].items():
        lines = [json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in samples]
        (output / f"samples_{task}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _facts(results: Mapping[str, Any], evaluation: Evaluation, lm: RememberingModel) -> dict[str, Any]:
    return {
        "lm_eval_version": results["lm_eval_version"],
        "task_versions": dict(results["versions"]),
        "task_hashes": task_hashes(results["samples"]),
        "num_fewshot": dict(results["n-shot"]),
        "documents": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "batch_size": evaluation.batch_size,
        "apply_chat_template": evaluation.apply_chat_template,
        "truncated_requests": lm.truncated_requests,
        "engine": lm.engine_facts,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "seeds": SEEDS,
        "score_cache": lm.score_cache_facts,
    }
