"""What the routers of a trained mixture do on rows and tasks, trained on or not, beside a shuffled-label control."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_lab.adapters.routing import (
    RoutingLog,
    RoutingStatistics,
    RoutingTotals,
    routing_specialization,
    set_routing_log,
)
from lora_lab.data.batches import collate
from lora_lab.data.encode import Encoded
from lora_lab.data.rows import Row
from lora_lab.evaluate.heldout import scoring_mode
from lora_lab.record.atomic import write_text
from lora_lab.record.run_record import ROUTING_FILE

SCHEMA_VERSION = 1
# The task made of the skills that the embedded data trains on; every other task is of something else.
TRAINED_TASKS = ("skills_trained",)
# Sequences per label, tokens of each (its last ones, as lm-eval cuts) and sequences per forward pass: a look, not a
# second scoring.
SEQUENCES, TOKENS, BATCH_SIZE = 16, 1024, 8
PERMUTATIONS, SEED = 999, 0
# Of a file of some hundred thousand numbers.
_DIGITS = 7

Source = Literal["heldout", "task"]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Sequences of one label, each of at least one token. trained: whether training saw the like."""

    label: str
    source: Source
    trained: bool
    sequences: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Heard:
    """What every router did on one sample: over its tokens, and as mean probabilities [sequences, experts]."""

    sample: _Sample
    statistics: Mapping[str, RoutingStatistics]
    sequences: Mapping[str, NDArray[np.float64]]


def write_routing(
    model: Any,
    tokenizer: Any,
    heldout: Sequence[Encoded],
    rows: Sequence[Row],
    tasks: Sequence[str],
    output: Path,
    *,
    adapter_name: str = "default",
) -> dict[str, Any]:
    """Runs `model` over samples of what it was scored on, and writes what its routers did to `output`/routing.json.

    The samples are the first SEQUENCES held-out rows of each label (`Row.skill`, else `Row.type`, else "heldout"), and
    the first SEQUENCES documents of each task whose `samples_TASK.jsonl` is in `output` (a group of tasks has none):
    context and first continuation. Weights, modes, random state and the routers' own log are as before afterwards.

    heldout, rows: the held-out rows as tokens and as text, in the same order. tasks: names as lm-eval scored them.

    Returns the file's content:
    `labels`: one entry per sample with label, source (`heldout` or `task`), trained, sequences, tokens, and `routers`:
    `RoutingStatistics` by the module's full name.
    `specialization`: `routing_specialization` over the sequences of `trained` samples and of `all`, with the number of
    permutations and their seed; None with fewer than two samples.

    Raises:
        ValueError: the adapter has no router in this model, or the rows do not fit each other.
    """
    samples = [*_heldout_samples(heldout, rows), *_task_samples(tasks, tokenizer, output)]
    longest = min(TOKENS, int(getattr(model.config, "max_position_embeddings", TOKENS)))
    with scoring_mode(model), torch.inference_mode(), _listening(model, adapter_name) as log:
        heard = [_hear(model, log, sample, longest=longest, pad_id=tokenizer.pad_token_id) for sample in samples]
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "labels": [_label(one) for one in heard],
        "specialization": {
            "trained": _specialization([one for one in heard if one.sample.trained]),
            "all": _specialization(heard),
        },
    }
    write_text(output / ROUTING_FILE, json.dumps(content, allow_nan=False, ensure_ascii=False))
    return content


def routing_summary(content: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers of `write_routing`'s content that go into a result.

    labels: by `source/label` whether it was trained on, and the means over routers of relative entropy (None where all
    have a single expert) and top-2 mass. p_value: of the control by shuffled labels, None where there is none.
    """
    specialization = content["specialization"]
    return {
        "labels": {
            f"{one['source']}/{one['label']}": {
                "trained": one["trained"],
                "relative_entropy": _mean(router["relative_entropy"] for router in one["routers"].values()),
                "top2_mass": _mean(router["top2_mass"] for router in one["routers"].values()),
            }
            for one in content["labels"]
        },
        "p_value": {side: None if found is None else found["p_value"] for side, found in specialization.items()},
    }


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _heldout_samples(heldout: Sequence[Encoded], rows: Sequence[Row]) -> list[_Sample]:
    chosen: dict[str, list[tuple[int, ...]]] = {}
    for encoded, row in zip(heldout, rows, strict=True):
        sequences = chosen.setdefault(row.skill or row.type or "heldout", [])
        if len(sequences) < SEQUENCES:
            sequences.append(encoded.input_ids)
    return [_Sample(label, "heldout", True, tuple(sequences)) for label, sequences in chosen.items()]


def _task_samples(tasks: Sequence[str], tokenizer: Any, output: Path) -> list[_Sample]:
    samples = []
    for task in dict.fromkeys(tasks):
        path = output / f"samples_{task}.jsonl"
        texts = _texts(path) if path.is_file() else []
        sequences = tuple(ids for text in texts if (ids := _tokens(text, tokenizer)))
        if sequences:
            samples.append(_Sample(task, "task", task in TRAINED_TASKS, sequences))
    return samples


def _texts(path: Path) -> list[str]:
    """Context and first continuation of the first documents; of a generative task, which has none, the context."""
    texts: dict[int, str] = {}
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            sample = json.loads(line)
            if sample["doc_id"] in texts:  # a document stands there once per filter
                continue
            if len(texts) == SEQUENCES:
                break
            texts[sample["doc_id"]] = "".join(part for part in sample["arguments"][0] if isinstance(part, str))
    return list(texts.values())


def _tokens(text: str, tokenizer: Any) -> tuple[int, ...]:
    """As lm-eval has it: the tokenizer's own special tokens, unless the text brings its BOS along."""
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tuple(tokenizer(text, add_special_tokens=not begins, verbose=False)["input_ids"])


@contextmanager
def _listening(model: nn.Module, adapter_name: str) -> Iterator[RoutingLog]:
    """A log that hears the adapter's routers; afterwards every layer notes where it did before."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "routing_log")]
    before = [(layer, layer.routing_log, layer.routing_adapter) for layer in layers]
    log = RoutingLog()
    set_routing_log(model, log, adapter_name)
    try:
        yield log
    finally:
        log.clear()
        for layer, own, adapter in before:
            layer.routing_log, layer.routing_adapter = own, adapter


def _hear(model: nn.Module, log: RoutingLog, sample: _Sample, *, longest: int, pad_id: int) -> _Heard:
    totals = RoutingTotals(keep_sequences=True)
    device = next(model.parameters()).device
    examples = [Encoded(ids[-longest:], (False,) * len(ids[-longest:]), cut=False) for ids in sample.sequences]
    for start in range(0, len(examples), BATCH_SIZE):
        batch = collate(examples[start : start + BATCH_SIZE], pad_id, device)
        log.open(batch.attention_mask)
        # One position of logits: the head has no router, and a full vocabulary per token is most of a small model.
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
        log.close()
        totals.add(log.entries, batch.attention_mask)
        log.clear()
    return _Heard(sample, totals.statistics(), totals.sequence_probabilities())


def _label(heard: _Heard) -> dict[str, Any]:
    sample = heard.sample
    return {
        "label": sample.label,
        "source": sample.source,
        "trained": sample.trained,
        "sequences": len(sample.sequences),
        "tokens": next(iter(heard.statistics.values())).tokens,
        "routers": {name: _rounded(asdict(found)) for name, found in heard.statistics.items()},
    }


def _specialization(heard: Sequence[_Heard]) -> dict[str, Any] | None:
    if len(heard) < 2:
        return None
    labels = [index for index, one in enumerate(heard) for _ in one.sample.sequences]
    loads = [np.concatenate([one.sequences[router] for one in heard]) for router in heard[0].sequences]
    found = routing_specialization(loads, labels, permutations=PERMUTATIONS, seed=SEED)
    return {**asdict(found), "permutations": PERMUTATIONS, "seed": SEED}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
