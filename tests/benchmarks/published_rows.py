"""Published peaks of training and generation, row by row: what is traced for each, or why none is.

A row is left out for an unknown set-up, several GPUs, a secondary or unverified source, or a step that nobody traces
here; never for the size of its error. Set-ups that the table does not hold come from the source beside them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_lab.plan.timeline import Timeline
from lora_lab.predict.styles.lit_linear import Packing, Tuning
from lora_lab.predict.styles.lit_shapes import PUBLISHED
from lora_lab.predict.styles.lit_step import LitRun, generation_timeline, training_timeline
from tests.benchmarks.published_hub import HUB_ROWS

MODELS = {
    "phi-1.5 1.3 B": "phi-1.5",
    "StableLM Alpha 3 B": "stablelm-base-alpha-3b",
    "Llama 2 7 B": "llama-2-7b",
    "Llama-2-7B": "llama-2-7b",
    "Llama 2 13 B": "llama-2-13b",
    "Llama 2 70 B": "llama-2-70b",
    "CodeLlama 34 B": "codellama-34b",
    "Falcon 40 B": "falcon-40b",
    "Falcon-7B": "falcon-7b",
}
_PACKING = {
    "none": None,
    "": None,
    "bnb.nf4": Packing(nested=False),
    "bnb.fp4": Packing(nested=False),
    "bnb.nf4-dq": Packing(nested=True),
}
_ALL = frozenset(("q", "k", "v", "o", "mlp", "head"))
_QUERY_VALUE = frozenset(("q", "v"))
# Tokens of lit-gpt's example prompt ("Hello, my name is") with its start token, and how many it generates after it.
_PROMPT, _NEW, _NEW_OF_QUANTIZE = 6, 50, 256
# lit-gpt's default (finetune/lora.py of that commit), and so in the config hub's files but for Gemma.
_DROPOUT = 0.05
_HUB_LENGTH = 512
_HUB_NOTE = "rows are cut at 512 tokens; in all epochs two such micro-batches meet"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. published: GB, or None where it ran out of memory."""

    line: int
    values: Mapping[str, str]
    published: float | None

    @property
    def source(self) -> str:
        """Who published it."""
        return self.values["source"]


@dataclass(frozen=True, slots=True)
class Traced:
    """note: what is assumed of the run. ranges: other readings of the set-up, by name."""

    asked: LitRun | tuple[str, Packing | None, int]
    note: str
    ranges: Mapping[str, LitRun]


def rows_of(path: Path) -> list[Row]:
    """All lines, numbered as in the file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(line, values, _number(values["published_peak_gb"]))
            for line, values in enumerate(csv.DictReader(file), start=2)
        ]


def hub_rows() -> list[tuple[Row, Traced]]:
    """The rows of `published_hub`, each with what is traced for it."""
    found = []
    for one in HUB_ROWS:
        values = {
            "model": one.model,
            "method": "LoRA" if one.quantization == "none" else "QLoRA",
            "rank": str(one.rank),
            "targets": one.targets,
            "quantization": one.quantization,
            "micro_batch": str(one.micro_batch),
            "seq_len": str(_HUB_LENGTH),
            "published_peak_gb": str(one.published),
            "source": "LitGPT config hub at 967cfda1",
        }
        targets = _ALL if one.targets.startswith("all") else _QUERY_VALUE
        tuning = Tuning("lora", one.rank, targets, one.dropout)
        run = _hub_run(values, tuning, accumulates=one.steps_micro_batches > 1)
        found.append((Row(0, values, one.published), Traced(run, _HUB_NOTE, {})))
    return found


def timeline_of(asked: LitRun | tuple[str, Packing | None, int]) -> Timeline:
    """Traces it."""
    if isinstance(asked, LitRun):
        return training_timeline(asked)
    model, packing, new = asked
    return generation_timeline(PUBLISHED[model], packing, prompt=_PROMPT, new=new)


def traced(row: Row) -> Traced | str:
    """What to trace for a row, or why it is left out."""
    values = row.values
    if row.published is None and not values["published_peak_gb"].startswith("OOM"):
        return f"no peak was published: {values['published_peak_gb']}"
    if row.source.startswith("LitGPT resource-tables"):
        return _resource_table(values)
    if row.source == "LitGPT quantize.md":
        return _generation(values, _NEW_OF_QUANTIZE)
    if row.source.startswith("LitGPT config hub"):
        return _hub(values)
    if row.source.startswith("Raschka 2023"):
        return _raschka(values)
    return _why_not(row)


def _resource_table(values: Mapping[str, str]) -> Traced | str:
    if not values["gpu"].startswith("1 x"):
        return f"several GPUs: {values['gpu']}"
    if values["method"] == "inference":
        return _generation(values, _NEW)
    tunings = {"Adapter v1": Tuning("prompt"), "Adapter v2": Tuning("prompt_and_scale")}
    tuning = tunings.get(values["method"]) or _lora(8, _QUERY_VALUE)
    return Traced(_first(values, tuning), "the longest row comes first", {})


def _generation(values: Mapping[str, str], new: int) -> Traced | str:
    if values["quantization"] not in _PACKING:
        return f"a step that is not traced: LLM.int8 of 2023 ({values['quantization']}) with its tiled copies"
    asked = MODELS[values["model"]], _PACKING[values["quantization"]], new
    return Traced(asked, f"{_PROMPT} tokens of prompt, room for {new} more", {})


def _hub(values: Mapping[str, str]) -> Traced | str:
    if values["method"] == "full":
        return f"several GPUs: {values['gpu']}"
    if not values["gpu"].startswith("1x"):
        return "the run of another row, on a machine with GPUs it does not use (its file says devices: 1)"
    run = _hub_run(values, _lora(int(values["rank"]), _QUERY_VALUE), accumulates=True)
    return Traced(run, _HUB_NOTE, {})


def _hub_run(values: Mapping[str, str], tuning: Tuning, *, accumulates: bool) -> LitRun:
    packing = _PACKING[values["quantization"]]
    return LitRun(
        shape=PUBLISHED[values["model"]],
        packing=packing,
        tuning=tuning,
        optimizer="adamw" if packing is None else "paged_adamw",
        micro_batch=int(float(values["micro_batch"])),
        length=_HUB_LENGTH,
        first=False,
        accumulates=accumulates,
        before=_HUB_LENGTH,
    )


def _raschka(values: Mapping[str, str]) -> Traced | str:
    if values["method"] == "full":
        return f"several GPUs: {values['gpu']}"
    if values["seq_len"] == "not stated":
        return "unknown set-up: length and data of the submission run"
    targets = _ALL if values["targets"].startswith("all") else _QUERY_VALUE
    run = _first(values, _lora(int(values["rank"]), targets))
    if values["seq_len"].endswith("2048"):
        # LIMA has several rows that are cut at 2048 tokens, so one comes when there are gradients.
        later = _changed(run, first=False, before=0)
        readings = {"first of all": run, "after another of 2048": _changed(later, before=2048)}
        return Traced(later, "a cut row after the first step, without what came before it: a lower bound", readings)
    if "not stated" in values["targets"]:
        other = {"query and value": _changed(run, tuning=_lora(256, _QUERY_VALUE))}
        return Traced(run, "all linear layers, as the runs around it", other)
    return Traced(run, "the longest row comes first", {})


def _first(values: Mapping[str, str], tuning: Tuning) -> LitRun:
    packing = _PACKING[values["quantization"]]
    adam = "adamw" if packing is None else "paged_adamw"
    return LitRun(
        shape=PUBLISHED[MODELS[values["model"]]],
        packing=packing,
        tuning=tuning,
        optimizer="sgd_momentum" if values["optimizer"] == "SGD" else adam,  # type: ignore[arg-type]
        micro_batch=int(float(values["micro_batch"])),
        length=int(values["seq_len"].removeprefix("<=")),
        first=True,
        accumulates=True,
        before=0,
    )


def _lora(rank: int, targets: frozenset[str]) -> Tuning:
    return Tuning("lora", rank, targets, _DROPOUT)


def _changed(run: LitRun, **fields: object) -> LitRun:
    return replace(run, **fields)  # type: ignore[arg-type]


def _why_not(row: Row) -> str:
    for beginning, why in _OTHERS.items():
        if row.source.startswith(beginning):
            return why
    return "secondary or unverified source, or no set-up"


_OTHERS = {
    "torchtune tutorial": "unknown set-up: version, checkpointing and longest rows of the run; reserved, not allocated",
    "torchtune QLoRA tutorial": "unknown set-up: version, checkpointing and longest rows of the run; reserved",
    "torchtune README (": "unknown set-up: which of its options were on; compiled",
    "torchtune README optimization": "a step that is not traced: torchtune's, most rows compiled or off-loaded",
    "LISA Table 1 protocol": "read from one step of its own script, by memory_allocated() and not the peak; see below",
    "LISA Table 1": "unverified: the table was not found as text",
    "Soup independent": "unknown set-up: lengths of the rows",
    "Qwen README": "a step that is not traced: the model's own code, under DeepSpeed",
    "QLoRA paper memory breakdown": "read off a figure, approximately",
    "LLaMA-Factory": "estimates, not measurements",
    "LitGPT finetune_lora.md": "a step that is not traced: mixed precision; length not stated",
}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
