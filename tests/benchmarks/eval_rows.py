"""What `eval_speed` runs: its rows, how many documents of each task, and what is asked of the ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

_STUDY = {  # 10 % of each task of the well-known LoRA study, so that their mixture is that of the whole suite
    "truthfulqa_mc1": 82,
    "truthfulqa_mc2": 82,
    "blimp_causative": 100,
    "mmlu_global_facts": 10,
    "arithmetic_2ds": 200,
    "arithmetic_4ds": 200,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One call of lm-eval. documents: task -> how many, from the first on. num_fewshot: None is the task's own.
    target: the least ratio of lm-eval's seconds to ours, by the issue; 1 is: not slower."""

    name: str
    documents: Mapping[str, int]
    num_fewshot: int | None = None
    target: float = 1.0


ROWS = (
    Row("truthfulqa_mc1", {"truthfulqa_mc1": 25}),
    Row("truthfulqa_mc2", {"truthfulqa_mc2": 25}),
    Row("blimp_causative", {"blimp_causative": 200}),
    Row("mmlu_global_facts", {"mmlu_global_facts": 100}),
    Row("arithmetic_2ds", {"arithmetic_2ds": 200}),
    Row("arithmetic_4ds", {"arithmetic_4ds": 200}),
    Row("truthfulqa_mc1+mc2", {"truthfulqa_mc1": 100, "truthfulqa_mc2": 100}, target=20.0),
    Row("six_tasks", _STUDY, target=10.0),
    # The first three subjects of the alphabet.
    Row(
        "mmlu_5shot",
        {"mmlu_abstract_algebra": 60, "mmlu_anatomy": 60, "mmlu_astronomy": 60},
        num_fewshot=5,
        target=5.0,
    ),
    Row("winogrande", {"winogrande": 100}),
    Row("piqa", {"piqa": 100}),
    Row("arc_easy", {"arc_easy": 100}),
    Row("copa", {"copa": 100}),
    # lm-eval draws other examples for each document, so that prompts share next to nothing.
    Row("gsm8k", {"gsm8k": 16}, num_fewshot=5),
)


@dataclass(frozen=True, slots=True)
class Growth:
    """How cost grows. requests: the first so many of `pool`; stock is run up to `stock_requests` of them. shots: of
    `prefix`, whose examples stand before every document. budgets: chunk_tokens of the spread, over all requests of
    `spread`. guard: whose requests the guard draws from."""

    pool: Row
    requests: Sequence[int]
    stock_requests: int
    prefix: Row
    shots: Sequence[int]
    spread: Sequence[Row]
    budgets: Sequence[int]
    guard: Row


WARM_UP = Row("warm-up", {"copa": 2})
_ROW = {row.name: row for row in ROWS}
GROWTH = Growth(
    pool=Row("truthfulqa_mc1", {"truthfulqa_mc1": 100}),
    requests=(1, 2, 4, 8, 16, 32, 64, 128, 256, 450),
    stock_requests=64,
    prefix=Row("mmlu_anatomy", {"mmlu_anatomy": 8}),
    shots=(0, 1, 2, 3, 4, 5),
    spread=(
        Row("truthfulqa_mc1+mc2", {"truthfulqa_mc1": 25, "truthfulqa_mc2": 25}),
        Row("mmlu_5shot", {"mmlu_anatomy": 20}, num_fewshot=5),
        Row("winogrande", {"winogrande": 50}),
    ),
    budgets=(128, 256, 512, 1024, 2048),
    guard=_ROW["six_tasks"],
)


def chosen_rows(names: Sequence[str] | None, documents: Mapping[str, int], *, quick: bool) -> list[Row]:
    """The rows of these names (None: all) with `documents` per task changed.

    Raises:
        ValueError: a name that no row has, or a task that no row runs.
    """
    unknown = [name for name in names or () if name not in _ROW]
    unknown += [task for task in documents if not any(task in row.documents for row in ROWS)]
    if unknown:
        raise ValueError(f"not among the rows or tasks of the benchmark: {', '.join(unknown)}; rows: {', '.join(_ROW)}")
    return [_sized(row, documents, quick=quick) for row in ROWS if names is None or row.name in names]


def chosen_growth(documents: Mapping[str, int], *, quick: bool) -> Growth:
    """`GROWTH`, or a smoke test of it."""
    if not quick:
        return replace(GROWTH, guard=_sized(GROWTH.guard, documents, quick=False))
    sized = {name: _sized(getattr(GROWTH, name), {}, quick=True) for name in ("pool", "prefix", "guard")}
    spread = [_sized(row, {}, quick=True) for row in GROWTH.spread]
    return replace(GROWTH, requests=(1, 4), stock_requests=4, shots=(0, 1), spread=spread, **sized)


def _sized(row: Row, documents: Mapping[str, int], *, quick: bool) -> Row:
    most = 2 if quick else None
    sizes = {
        task: documents.get(task, count if most is None else min(most, count)) for task, count in row.documents.items()
    }
    return replace(row, documents=sizes)
