"""A study with claims of every kind, its made-up runs, registered and asked for as `reproduce` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.plan.expand import expand
from lora_lab.record.atomic import write_json
from lora_lab.record.ledger import run_id_of
from lora_lab.record.planned_facts import PlannedFacts, write_planned
from lora_lab.record.registration import register, registration_json
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.study_folder import begin_study, study_folder
from lora_lab.record.study_points import Stage, StudyPoint, write_points
from lora_lab.record.verdicts import begin_look
from lora_lab.schema.study import Study, study_from
from tests.page_ledger import add_run
from tests.unit.judge_samples import DATA, MODEL, write_rows
from tests.unit.ledger_samples import digest, loss, trial_of

_HEAD = {"rule": "superiority", "metric": "heldout/loss", "claimed": "lower", "smallest_difference": 0.05}
_PAPER = "https://arxiv.org/abs/2106.09685, table 1"
CLAIMS: list[dict[str, Any]] = [
    {
        "id": "all_layers_better",
        "statement": "Adapters on all layers are better than on query and value.",
        **_HEAD,
        "forms": ["as_published", "tuned"],
        "arm": "all8",
        "against": "qv8",
        "differences": "The source scores answers; here it is held-out loss.",
        "published": [
            {"id": "qv", "value": 52.2, "unit": "%", "what": "accuracy, query and value", "provenance": _PAPER},
            {"id": "all", "value": 53.1, "unit": "%", "what": "accuracy, all layers", "provenance": _PAPER},
        ],
    },
    {
        "id": "rank_helps",
        "statement": "Rank 8 beats rank 2.",
        **_HEAD,
        "arm": ["qv8", "all8"],
        "against": ["qv2", "all2"],
    },
    {
        "id": "ranks_equal",
        "statement": "Rank makes no difference on query and value.",
        "rule": "equality",
        "metric": "heldout/loss",
        "arm": "qv8",
        "against": "qv2",
        "margin": 0.1,
    },
    {
        "id": "best",
        "statement": "Rank 8 on all layers is best.",
        "rule": "best_of",
        "metric": "heldout/loss",
        "arms": ["qv2", "qv8", "all2", "all8"],
        "best": "all8",
        "claimed": "lower",
        "smallest_difference": 0.0,
    },
    {
        "id": "slower",
        "statement": "All layers take at least a twentieth longer.",
        "rule": "ratio",
        "measure": "step_seconds",
        "arm": "all8",
        "against": "qv8",
        "low": 1.05,
    },
    {
        "id": "headline",
        "statement": "It takes 39 % longer, by the published seconds.",
        "rule": "exact",
        "value": "100 * (slow_s / fast_s - 1)",
        "low": 38,
        "high": 40,
        "published": [
            {"id": "fast_s", "value": 6685.75, "unit": "s", "what": "time, LoRA", "provenance": "a talk, 12 May"},
            {"id": "slow_s", "value": 10059.53, "unit": "s", "what": "time, QLoRA", "provenance": "a talk, 12 May"},
        ],
    },
    {
        "id": "predicted",
        "statement": "The published peak is what is predicted.",
        "rule": "exact",
        "value": "planned(predicted_peak_allocated_bytes, all8) / 1e9 / peak_gb",
        "low": 0.95,
        "high": 1.05,
        "published": [{"id": "peak_gb", "value": 16.62, "unit": "GB", "what": "peak", "provenance": _PAPER}],
    },
    {"id": "both", "statement": "Both hold.", "rule": "conjunction", "parts": ["all_layers_better", "rank_helps"]},
    {
        "id": "judge",
        "statement": "A judge prefers it.",
        "rule": "not_runnable",
        "reason": "there is no judge model here",
    },
]
CONTENT: dict[str, Any] = {
    "question": "Is it where the adapters sit, or how large they are?",
    "source": {"title": "A paper", "url": "https://arxiv.org/abs/2106.09685", "notes": "A small model stands in."},
    "base": {"model": "smollm2_135m", "data": "skills"},
    "seeds": [0, 1, 2, 3, 4],
    "grids": [{"target": ["qv", "all_linear"], "rank": [2, 8], "learning_rate": [2e-3, "tuned"]}],
    "metrics": ["heldout/loss"],
    "arms": {
        "qv2": {"target": "qv", "rank": 2},
        "qv8": {"target": "qv", "rank": 8},
        "all2": {"target": "all_linear", "rank": 2},
        "all8": {"target": "all_linear", "rank": 8},
    },
    "tuning": {"metric": "heldout/loss", "seeds": [100], "rates": [{"values": [1e-3, 4e-3, 1.6e-2]}]},
    "timing": {"arms": ["qv8", "all8"], "repeats": 3, "base": {}},
    "claims": CLAIMS,
}
_QV = {"query": True, "value": True, "mlp": False, "modules": []}
_TARGETS = {"qv": _QV, "all_linear": {**_QV, "key": True, "projection": True, "mlp": True}}
_ROWS = 48
# Before the runs, all of which ended at the beginning of 2026.
REGISTERED = "2025-12-31T12:00:00.000+00:00"


def claims_study(**changes: Any) -> Study:
    """The study; changes are keys of its file."""
    return study_from({**CONTENT, **changes}, name="crafted")


def fill_claims(
    root: Path, study: Study | None = None, *, all_gain: float = 0.25, registered_at: str = REGISTERED
) -> Study:
    """Every run of every stage. all_gain: how much lower the loss of all layers is, in nats."""
    chosen = study or claims_study()
    points: list[StudyPoint] = []
    folder = study_folder(root, chosen.name)
    registration = replace(register(folder, chosen, "pocket"), registered_at=registered_at)
    write_json(folder / "registration.json", registration_json(registration))
    begin_look(folder, registration.digest, "pocket", chosen.seeds)
    settings = list({_key(values): values for values in expand(chosen)}.values())
    for values in (one for one in settings if one["learning_rate"] == "tuned"):
        for rate, away in ((1e-3, 0.3), (4e-3, 0.0), (1.6e-2, 0.4)):
            points.append(
                _run(root, {**values, "seed": 100}, "tuning", rate=rate, gain=all_gain, away=away, heldout=12)
            )
    for values in expand(chosen):
        picked = 4e-3 if values["learning_rate"] == "tuned" else None
        points.append(_run(root, values, "judged", rate=picked, gain=all_gain))
    planned = [StudyPoint("planned", values, f"{number:016x}") for number, values in enumerate(settings)]
    for repeat in range(3):
        for place, target in enumerate(("qv", "all_linear")):
            values = {**chosen.base, "target": target, "rank": 8, "learning_rate": 2e-3, "seed": 0}
            points.append(_timed(root, values, repeat=repeat, place=place))
    begin_study(root, chosen, [point.run_id for point in points if point.stage == "judged"])
    write_points(folder, [*points, *planned])
    write_planned(folder, {point.run_id: _planned(point.values) for point in planned})
    return chosen


def _key(values: Mapping[str, Any]) -> str:
    return repr(sorted((key, value) for key, value in values.items() if key != "seed"))


def _planned(values: Mapping[str, Any]) -> PlannedFacts:
    return PlannedFacts(
        {"predicted_peak_allocated_bytes": 16_550_000_000 if values["target"] != "qv" else 14_000_000_000}
    )


def _trial(values: Mapping[str, Any], *, rate: float | None, heldout: int = 9, **changes: Any) -> dict[str, Any]:
    return trial_of(
        model=MODEL,
        data={**DATA, "heldout_seed": heldout},
        target=_TARGETS[values["target"]],
        rank=values["rank"],
        alpha=2.0 * values["rank"],
        learning_rate=values["learning_rate"] if rate is None else rate,
        seed=values["seed"],
        **changes,
    )


def _run(
    root: Path,
    values: Mapping[str, Any],
    stage: Stage,
    *,
    rate: float | None,
    gain: float,
    away: float = 0.0,
    heldout: int = 9,
) -> StudyPoint:
    trial = _trial(values, rate=rate, heldout=heldout)
    level = 2.3 + away - (gain if values["target"] != "qv" else 0.0) - 0.02 * values["rank"] / 8
    nats, tokens = _rows(values["seed"], level, key=f"{values['target']}{values['rank']}{rate}")

    def also(folder: RunFolder) -> None:
        write_rows(folder, nats, tokens, order=None)

    score = float(nats.sum() / tokens.sum())
    name = f"lora-r{values['rank']}-{values['target']}-s{values['seed']}"
    add_run(root, trial, name=name, score=score, also=also, metrics={"heldout/loss": loss(score, num_examples=_ROWS)})
    return StudyPoint(stage, dict(values), run_id_of(digest(trial), 0), rate)


def _rows(seed: int, level: float, *, key: str) -> tuple[Any, Any]:
    """Nats and loss tokens: rows are as hard in every run; seed, setting and their product add noise."""
    easy = np.random.default_rng(7)
    tokens = easy.integers(2, 11, size=_ROWS).astype(np.float64)
    rows = 0.5 * easy.standard_normal(_ROWS)
    noise = np.random.default_rng([seed, *key.encode()]).standard_normal(_ROWS + 1)
    return (level + rows + 0.03 * noise[-1] + 0.15 * noise[:-1]) * tokens, tokens


def _timed(root: Path, values: Mapping[str, Any], *, repeat: int, place: int) -> StudyPoint:
    """A run for the clock, in turns with the other arm."""
    trial = _trial(values, rate=None, training={"max_steps": 4})
    minute = 2 * repeat + place
    add_run(
        root,
        trial,
        repeat=repeat,
        steps=4,
        measurements={"step_seconds": 0.4 * (1.3 if place else 1.0) * (1 + 0.03 * ((repeat + place) % 2))},
        started_at=f"2026-01-01T01:{minute:02}:00.000+00:00",
        finished_at=f"2026-01-01T01:{minute:02}:50.000+00:00",
    )
    return StudyPoint("timing", dict(values), run_id_of(digest(trial), repeat))


def with_claim(claims: Sequence[Mapping[str, Any]] = CLAIMS, **changes: Any) -> Study:
    """The study with its first claim changed."""
    return claims_study(claims=[{**claims[0], **changes}, *claims[1:]])
