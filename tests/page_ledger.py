"""Ledgers of made-up runs for tests of the page: curves, answers, failures, and texts that try to break out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.record.layer_log import write_observation
from lora_lab.record.ledger import Ledger, run_id_of
from lora_lab.record.result import Metric, Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.run_record import ROUTING_FILE, RunRecord
from lora_lab.record.step_log import StepLog
from tests.unit.ledger_samples import as_member, claim, digest, loss, result_of, trial_of

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
    repeat: int = 0,
    score: float = 2.5,
    steps: int = 12,
    status: Status = Status.COMPLETED,
    reason: str | None = None,
    answer: str = "42",
    metric_name: str = "heldout/loss",
    step_values: Mapping[str, float] | None = None,
    shared_steps: Mapping[str, float] | None = None,
    also: Callable[[RunFolder], None] = lambda folder: None,
    **changes: Any,
) -> RunRecord:
    """One run with a falling loss, sample answers and costs that follow from its rank. step_values: in every step's
    line too. shared_steps: in every line in place of what is measured of a run that is alone. also: what else is
    written into its folder."""
    ledger = Ledger(root)
    folder = claim(ledger, trial, repeat=repeat, name=name)
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
                        **({"seconds": 0.5, "rss_bytes": 2_000_000_000} if shared_steps is None else shared_steps),
                        **{name: one / step for name, one in (step_values or {}).items()},
                    },
                )
        lines = [{"index": 0, "prompt": f"What is {answer}?", "expected": "42", "answer": answer, "is_complete": True}]
        (folder.eval_folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        also(folder)
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
    record = ledger.find(digest(trial), repeat)
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


def add_cohort(
    root: Path, cohort: str, trials: Sequence[dict[str, Any]], *, seats: int, on_cpu: bool = True, score: float = 2.5
) -> list[RunRecord]:
    """Runs that were trained together, the first of them to its end first; each score is 0.01 above the last."""
    members = [run_id_of(digest(trial), 0) for trial in trials]
    shared = {"cohort_tokens_per_second": 345.0, "cohort_rss_bytes": 3_000_000_000}
    return [
        add_run(
            root,
            trial,
            score=score + 0.01 * place,
            shared_steps=shared,
            **as_member(cohort, members, seats=seats, wall=10.0 * (place + 1), on_cpu=on_cpu),
        )
        for place, trial in enumerate(trials)
    ]


KINDS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def add_routed_run(
    root: Path,
    *,
    seed: int = 0,
    experts: Sequence[int] = (2, 3, 4),
    kinds: Mapping[str, Sequence[str]] = KINDS,
    kind: str = "mola",
    labels: Sequence[str] = ("copy", "add"),
    name: str | None = None,
    steps: int = 12,
) -> RunRecord:
    """A mixture with as many experts in layer l as `experts` says, looked at in four intervals and at evaluation."""
    draw = random.Random(seed)
    counts = {
        f"model.layers.{layer}.{part}.{end}": count
        for layer, count in enumerate(experts)
        for part, ends in kinds.items()
        for end in ends
    }
    quarters = [max(steps * part // 4, 1) for part in (1, 2, 3, 4)]
    summary: dict[str, Any] = {"labels": {}, "p_value": {"trained": 0.001, "all": 0.002 + seed / 500}}

    def write(folder: RunFolder) -> None:
        for step in quarters:
            write_layers(folder.path / "layers.jsonl", step, counts, draw)
        sources = [("heldout", label, True) for label in labels]
        sources += [("task", "skills_trained", True), ("task", "skills_unseen", False), ("task", "prose", False)]
        told = [_label(source, label, trained, counts, draw) for source, label, trained in sources]
        for one in told:
            routers = one["routers"].values()
            entropies = [router["relative_entropy"] for router in routers if router["relative_entropy"] is not None]
            summary["labels"][f"{one['source']}/{one['label']}"] = {
                "trained": one["trained"],
                "relative_entropy": math.fsum(entropies) / len(entropies),
                "top2_mass": math.fsum(router["top2_mass"] for router in routers) / len(counts),
            }
        numbers = {"statistic": 0.0041, "shuffled_mean": 0.0013, "shuffled_quantile_95": 0.0019, "seed": 0}
        sides = {side: {**numbers, "p_value": p, "permutations": 999} for side, p in summary["p_value"].items()}
        content = {"schema_version": 1, "labels": told, "specialization": sides}
        (folder.eval_folder / ROUTING_FILE).write_text(json.dumps(content))

    trial = trial_of(method={"kind": kind, "experts": list(experts), "top_k": 2, "balance_weight": 0.001}, seed=seed)
    trial["data"] = {"name": "skills"}
    facts = {"executed": "alone", "warnings": [], "evaluation": {"routing": summary}}
    losses = {"load_balancing_loss": 1.5}
    return add_run(root, trial, name=name, steps=steps, step_values=losses, also=write, facts=facts)


def write_layers(path: Path, step: int, counts: Mapping[str, int], draw: random.Random) -> None:
    """One observation of norms, routers and distances; the experts of higher layers are farther apart."""
    layers = 1 + max(int(name.split(".")[2]) for name in counts)
    weight = {"embedding": 310.0, **{str(layer): 90 + 2.0 * layer for layer in range(layers)}, "final_norm": 24.0}
    update = {"embedding": 0.0, **{str(layer): 0.01 * step * (1 + layer) for layer in range(layers)}, "final_norm": 0.0}
    routers = {name: _router(count, 1 / (1 + step / 20), draw) for name, count in counts.items()}
    distances = {
        name: None if count < 2 else step * (1 + 0.1 * int(name.split(".")[2]) + 0.3 * draw.random())
        for name, count in counts.items()
    }
    write_observation(path, step, "norms", {"weight": weight, "update": update})
    write_observation(path, step, "routing", {"routers": routers})
    write_observation(path, step, "experts", {"distances": distances})


def _router(experts: int, relative_entropy: float, draw: random.Random) -> dict[str, Any]:
    weights = [draw.random() ** (2 - relative_entropy) for _ in range(experts)]
    load = [weight / math.fsum(weights) for weight in weights]
    return {
        "tokens": 4000,
        "entropy": relative_entropy * math.log(experts),
        "relative_entropy": relative_entropy * (0.9 + 0.1 * draw.random()) if experts > 1 else None,
        "load": load,
        "chosen": [min(1.0, 2 * share) for share in load],
        "first": load,
        "top2_mass": math.fsum(sorted(load)[-2:]),
    }


def _label(source: str, label: str, trained: bool, counts: Mapping[str, int], draw: random.Random) -> dict[str, Any]:
    routers = {name: _router(count, 0.7 if trained else 0.8, draw) for name, count in counts.items()}
    fields = {"label": label, "source": source, "trained": trained, "sequences": 16, "tokens": 640}
    return {**fields, "routers": routers}


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
