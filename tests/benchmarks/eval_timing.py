"""One row of `eval_speed` through lm-eval with one engine: seconds of the model's calls, answers, metrics, samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from lora_lab.evaluate.harness import SEEDS
from lora_lab.evaluate.heldout import scoring_mode
from lora_lab.evaluate.lab_model import LabModel, Pair
from lora_lab.evaluate.readings import read_metrics
from lora_lab.evaluate.surroundings import console_to, data_cache, kept_random_state, one_environment_report
from lora_lab.evaluate.tasks import prepare_tasks
from tests.benchmarks.eval_rows import Row
from tests.evaluation_samples import evaluation


@dataclass(frozen=True, slots=True)
class Call:
    """One call that lm-eval makes of a model.

    seconds: from requests to answers, tokenisation included. pairs: the tokenised requests, one per request, or one
    per window of a rolling request; of generation the contexts alone. stock_tokens: read by lm-eval's own engine for
    log-likelihoods, padding included. facts: LabModel's about this call, empty where it notes none.
    """

    kind: str
    seconds: float
    requests: Sequence[Any]
    answers: Sequence[Any]
    pairs: Sequence[Pair]
    stock_tokens: int
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One engine on one row. seconds: of all calls; other_seconds: of lm-eval around them (data, prompts, metrics).
    metrics: `task/metric` -> value. samples: lm-eval's, per task. documents: task -> (run, all of the split)."""

    engine: str
    seconds: float
    other_seconds: float
    calls: Sequence[Call]
    metrics: Mapping[str, float]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    documents: Mapping[str, tuple[int, int]]


class TimedModel(LabModel):
    """LabModel that keeps what it was asked, what it answered and how long that took.

    calls: since `take_calls`. guard_seconds: spent comparing with lm-eval's engine so far.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._pairs: list[Pair] = []
        self._stock_tokens = 0
        self.calls: list[Call] = []
        self.guard_seconds = 0.0
        super().__init__(*args, progress=lambda _read, _total: None, **settings)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Timed."""
        return self._timed("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Timed."""
        return self._timed("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Timed; contexts are tokenised again for the counts, outside the time."""
        texts = self._timed("generate_until", super().generate_until, requests)
        # In place: the call that was just noted holds this list.
        self._pairs += [(None, self.tok_encode(request.args[0]), []) for request in requests]
        return texts

    def take_calls(self) -> list[Call]:
        """The calls so far, which are then forgotten."""
        calls, self.calls = self.calls, []
        return calls

    def _timed(self, kind: str, call: Callable[..., Any], requests: Sequence[Any]) -> Any:
        self._pairs, self._stock_tokens = [], 0
        noted = len(self.engine_facts)
        start = time.perf_counter()
        answers = call(requests, disable_tqdm=True)
        seconds = time.perf_counter() - start
        facts = self.engine_facts[-1] if len(self.engine_facts) > noted else {}
        self.calls.append(Call(kind, seconds, requests, answers, self._pairs, self._stock_tokens, facts))
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Pair], *args: Any, **settings: Any) -> Any:
        self._pairs[:] = requests
        return super()._loglikelihood_tokens(requests, *args, **settings)

    def _model_call(self, inps: Any, *args: Any, **settings: Any) -> Any:
        self._stock_tokens += inps.numel()
        return super()._model_call(inps, *args, **settings)

    def _check_guarded(self, *args: Any) -> None:
        start = time.perf_counter()
        super()._check_guarded(*args)
        self.guard_seconds += time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rows have in common. mirror: folder of official rows; None for tasks that are the lab's own. cache: of
    task files and data. log: what lm-eval prints. models: one per engine, around the same network.
    options: settings of all of them."""

    models: Mapping[str, TimedModel]
    mirror: Path | None
    cache: Path
    log: Path
    options: Mapping[str, Any]

    @classmethod
    def of(cls, network: Any, tokenizer: Any, *, batch_size: int, **places: Any) -> Bench:
        """Both engines, unguarded, around `network`."""
        options = {"pretrained": network, "tokenizer": tokenizer, "batch_size": batch_size}
        alone = cls(models={}, options=options, **places)
        return replace(
            alone, models={engine: alone.another(engine=engine, guard=False) for engine in ("stock", "tree")}
        )

    def another(self, **settings: Any) -> TimedModel:
        """A model around the same network with other settings."""
        with console_to(self.log):
            return TimedModel(**self.options, **settings)


def run_row(bench: Bench, row: Row, lm: TimedModel) -> EngineRun:
    """What `evaluate_model` does, with a given model and a number of documents per task."""
    asked = evaluation(
        *row.documents,
        mirror=None if bench.mirror is None else str(bench.mirror),
        batch_size=lm.batch_size,
        num_fewshot=row.num_fewshot,
        engine=lm.engine,
    )
    lm.take_calls()
    start = time.perf_counter()
    tasks = prepare_tasks(asked, cache=bench.cache)
    with (
        scoring_mode(lm.model),
        kept_random_state(),
        console_to(bench.log),
        one_environment_report(),
        data_cache(bench.cache, offline=True),
    ):
        results = simple_evaluate(
            model=lm,
            tasks=list(tasks.names),
            num_fewshot=row.num_fewshot,
            samples={task: list(range(count)) for task, count in row.documents.items()},
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_path=[str(path) for path in tasks.folders], include_defaults=False),
            **SEEDS,
        )
    calls = lm.take_calls()
    seconds = sum(call.seconds for call in calls)
    return EngineRun(
        engine=lm.engine,
        seconds=seconds,
        other_seconds=time.perf_counter() - start - seconds,
        calls=calls,
        metrics={name: metric.value for name, metric in read_metrics(results, chance={})[0].items()},
        samples=results["samples"],
        documents={task: (row.documents[task], count["original"]) for task, count in results["n-samples"].items()},
    )
