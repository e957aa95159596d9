"""Studies with made-up runs for tests of judging: scores are given example by example, and files follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.plan.expand import expand
from lora_lab.record.ledger import Ledger, run_id_of
from lora_lab.record.result import Metric, Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.run_record import RunRecord
from lora_lab.record.study_points import Stage, StudyPoint
from lora_lab.schema.claims import Scale
from lora_lab.schema.study import Study, study_from
from lora_lab.study.judge import judge_study
from lora_lab.study.verdict import Verdict
from tests.unit.ledger_samples import claim, digest, result_of, trial_of

DATA = {"kind": "skills", "heldout_size": 64, "heldout_seed": 9, "train_size": 100}
MODEL = {"kind": "embedded", "name": "smollm2_135m", "file": "x/SmolLM2-135M-Instruct.Q4_1.gguf"}
Array = npt.NDArray[np.float64]

# Two settings at a fixed rate, as arms `a` and `b`.
TWO_ARMS: dict[str, Any] = {
    "question": "Which is better?",
    "base": {"model": "smollm2_135m", "data": "skills"},
    "seeds": [0, 1, 2, 3, 4],
    "grids": [{"quantization": ["none", "nf4"], "learning_rate": [2e-3]}],
    "arms": {"a": {"quantization": "none"}, "b": {"quantization": "nf4"}},
}
LOWER = {
    "id": "lower",
    "statement": "a has a lower loss than b",
    "rule": "superiority",
    "metric": "heldout/loss",
    "arm": "a",
    "against": "b",
    "claimed": "lower",
    "smallest_difference": 0.05,
}


def study_of(*claims: Mapping[str, Any], **changes: Any) -> Study:
    """The study of two arms with these claims; changes are keys of its file."""
    return study_from({**TWO_ARMS, "claims": list(claims), **changes}, name="crafted")


@dataclass
class World:
    """A study with a ledger and the points that were asked for."""

    root: Path
    study: Study
    scale: Scale = "pocket"
    points: list[StudyPoint] = field(default_factory=list)
    planned: dict[str, dict[str, float | int | str] | str] = field(default_factory=dict)

    def settings(self) -> list[dict[str, Any]]:
        """Every point of the design, seeds included."""
        return expand(self.study.design(self.scale))

    def point(
        self, values: Mapping[str, Any], *, stage: Stage = "judged", rate: float | None = None, repeat: int = 0
    ) -> tuple[StudyPoint, dict[str, Any]]:
        """Asks for a run; returns its trial too."""
        held = {"tuning": 12}.get(stage, 9)
        is_base = values.get("method") == "base"
        told = {key: value for key, value in values.items() if key not in ("seed", "learning_rate")}
        trial = trial_of(
            model=MODEL,
            data={**DATA, "heldout_seed": held},
            method={"kind": "base" if is_base else "lora"},
            told=told,
            learning_rate=0.0 if is_base else (rate if rate is not None else values.get("learning_rate")),
            seed=0 if is_base else values.get("seed", 0),
        )
        made = StudyPoint(stage, dict(values), run_id_of(digest(trial), repeat), rate)
        self.points.append(made)
        return made, trial

    def run(
        self,
        values: Mapping[str, Any],
        *,
        rows: tuple[Array, Array] | None = None,
        samples: Mapping[str, Sequence[float]] | None = None,
        order: Sequence[int] | None = None,
        repeat: int = 0,
        stage: Stage = "judged",
        rate: float | None = None,
        chance: float | None = 0.25,
        **changes: Any,
    ) -> RunRecord:
        """A run with held-out rows (nats, loss tokens) and samples of tasks; order: of the lines in their files."""
        _, trial = self.point(values, stage=stage, rate=rate, repeat=repeat)
        ledger = Ledger(self.root)
        known = ledger.find(digest(trial), repeat)
        if known is not None:
            return known
        folder = claim(ledger, trial, repeat=repeat)
        assert folder is not None
        with folder:
            metrics: dict[str, Metric] = {}
            if rows is not None:
                metrics["heldout/loss"] = write_rows(folder, *rows, order=order)
            for task, scores in (samples or {}).items():
                metrics[f"{task}/acc"] = write_samples(folder, task, scores, order=order, chance=chance)
            status = changes.get("status", Status.COMPLETED)
            fields = {"metrics": metrics if status == Status.COMPLETED else {}, "facts": {"executed": "alone"}}
            folder.write_result(result_of(folder, **{**fields, **changes}))
        record = ledger.find(digest(trial), repeat)
        assert record is not None
        return record

    def verdicts(self, **options: Any) -> list[Verdict]:
        """All verdicts."""
        return judge_study(self.study, self.scale, self.points, self.planned, Ledger(self.root), **options)

    def verdict(self, **options: Any) -> Verdict:
        """The only verdict."""
        (one,) = self.verdicts(**options)
        return one


def write_rows(folder: RunFolder, nats: Array, tokens: Array, *, order: Sequence[int] | None) -> Metric:
    """Held-out rows; returns the metric that they make."""
    lines = [
        {"index": index, "loss": float(nats[index]), "loss_tokens": int(tokens[index]), "exact_match": False}
        for index in (order if order is not None else range(len(nats)))
    ]
    write_lines(folder.eval_folder / "heldout.jsonl", lines)
    value = float(nats.sum() / tokens.sum())
    return Metric(value=value, unit="nats/token", higher_is_better=False, standard_error=0.01, num_examples=len(nats))


def write_samples(
    folder: RunFolder, task: str, scores: Sequence[float], *, order: Sequence[int] | None, chance: float | None
) -> Metric:
    """A samples file as lm-eval writes it; documents 1 and 2 have the same text, so the same hash;
    doc_id is the place in the file."""
    lines = [
        {
            "doc_id": place,
            "doc_hash": f"h{1 if index == 2 else index}",
            "filter": "none",
            "metrics": ["acc"],
            "acc": scores[index],
        }
        for place, index in enumerate(order if order is not None else range(len(scores)))
    ]
    write_lines(folder.eval_folder / f"samples_{task}_2026-01-01T00-00-00.5.jsonl", lines)
    value = math.fsum(scores) / len(scores)
    count = len(scores)
    return Metric(
        value=value, unit="fraction", higher_is_better=True, standard_error=0.01, num_examples=count, chance=chance
    )


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def losses(seed: int, *, shift: float, rows: int = 48, spread: float = 0.1) -> tuple[Array, Array]:
    """Nats and loss tokens of rows: equal rows for every run, a shift per token, and noise of the seed."""
    easy = np.random.default_rng(7)
    tokens = easy.integers(2, 11, size=rows).astype(np.float64)
    level = 2.0 + 0.5 * easy.standard_normal(rows)
    noise = np.random.default_rng((seed, round(1000 * abs(shift)))).standard_normal(rows + 1)
    per_token = level + shift + 0.01 * noise[-1] + spread * noise[:-1]
    return per_token * tokens, tokens


def two_arms(root: Path, *claims: Mapping[str, Any], shift: float = 0.3, **changes: Any) -> World:
    """The study of two arms, all of its runs made: the loss of b is higher by shift."""
    world = World(root, study_of(*(claims or (LOWER,)), **changes))
    for values in world.settings():
        world.run(values, rows=losses(values["seed"], shift=shift if values["quantization"] == "nf4" else 0.0))
    return world
