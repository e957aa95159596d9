"""Ledgers of made-up runs for tests of the page: curves, answers, failures, and texts that try to break out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Metric, Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import StepLog
from tests.unit.ledger_samples import claim, digest, loss, result_of, trial_of

# Each would mark the page's root element if it ran.
_MARK = "document.documentElement.dataset.owned=1"
HOSTILE = (
    f"<script>{_MARK}</script>",
    f"</script><script>{_MARK}</script>",
    f'"><img src=x onerror={_MARK}>',
    "<!--<script>",
    f"'-({_MARK})-'",
    f"javascript:{_MARK}",
    "{{ 7 * 7 }}",
    "%{customdata[0]}",
    "\u202egnp.exe\u202c",
    "\x1b[31mred\x1b[0m\x07",
    "a\u2028b\u2029c",
    f"]]><svg onload={_MARK}>",
    "</title></style></noscript><base href=https://example.org/>",
    "&lt;b&gt;bold&lt;/b&gt; &amp;",
)


def add_run(
    root: Path,
    trial: dict[str, Any],
    *,
    name: str | None = None,
    score: float = 2.5,
    steps: int = 12,
    status: Status = Status.COMPLETED,
    reason: str | None = None,
    answer: str = "42",
    metric_name: str = "heldout/loss",
    **changes: Any,
) -> RunRecord:
    """One run with a falling loss, sample answers and costs that follow from its rank."""
    ledger = Ledger(root)
    folder = claim(ledger, trial, name=name)
    assert folder is not None
    with folder:
        with StepLog(folder.steps_path) as log:
            for step in range(1, steps + 1):
                value = score + 3 * math.exp(-4 * step / steps)
                log.write(
                    step,
                    {
                        "step": step,
                        "loss": value,
                        "learning_rate": 1e-3 * (1 - step / steps),
                        "gradient_norm": 1.0 + 1 / step,
                        "tokens": 400,
                        "loss_tokens": 100,
                        "padded_tokens": 420,
                        "seconds": 0.5,
                        "rss_bytes": 2_000_000_000,
                    },
                )
        lines = [{"index": 0, "prompt": f"What is {answer}?", "expected": "42", "answer": answer, "is_complete": True}]
        (folder.eval_folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        size = 1000 * int(trial["rank"])
        fields: dict[str, Any] = {
            "status": status,
            "reason": reason,
            "trainable_parameters": size,
            "metrics": {metric_name: loss(score), "skills/acc": _accuracy(score)} if status == Status.COMPLETED else {},
            "measurements": {
                "peak_allocated_bytes": 900_000_000 + 16 * size,
                "frozen_weight_bytes": 540_000_000,
                "trainable_weight_bytes": 4 * size,
                "gradient_bytes": 4 * size,
                "optimizer_state_bytes": 8 * size,
                "train_seconds": 10.0 + 0.1 * int(trial["rank"]),
                "tokens_per_second": 300.0,
                "wall_seconds": 20.0,
            },
            "facts": {"executed": "alone", "warnings": []},
        }
        folder.write_result(result_of(folder, **{**fields, **changes}))
    record = ledger.find(digest(trial), 0)
    assert record is not None
    return record


def _accuracy(score: float) -> Metric:
    value = min(max(1 - score / 6, 0.0), 1.0)
    return Metric(
        value=value, unit="fraction", higher_is_better=True, standard_error=0.02, num_examples=200, chance=0.25
    )


def fill(root: Path, *, ranks: Sequence[int], rates: Sequence[float], seeds: Sequence[int], steps: int = 12) -> None:
    """A product of settings and seeds, with the base as row zero; better with rank, best at the middle rate."""
    add_run(root, trial_of(method={"kind": "base"}), name="base", score=4.9, steps=0)
    for rank in ranks:
        for rate in rates:
            for seed in seeds:
                away = abs(math.log(rate / rates[len(rates) // 2]))
                score = 2.5 - 0.1 * math.log2(rank) + 0.3 * away + 0.02 * math.sin(7 * seed + rank)
                trial = trial_of(rank=rank, alpha=2.0 * rank, learning_rate=rate, seed=seed)
                add_run(root, trial, score=score, steps=steps)


def fill_hostile(root: Path) -> None:
    """Names, reasons, answers, tags of configuration and warnings that are markup, scripts and control sequences."""
    for index, text in enumerate(HOSTILE):
        trial = trial_of(rank=index + 1, model={"kind": "random", "name": text}, data={"name": text})
        failed = index % 3 == 2
        add_run(
            root,
            trial,
            name=text,
            answer=text,
            status=Status.FAILED if failed else Status.COMPLETED,
            reason=f"ValueError: {text}" if failed else None,
            facts={"executed": "alone", "warnings": [text]},
            missing={text: text},
        )
