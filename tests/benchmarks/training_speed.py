"""Training speed, side by side in one process: the lab's loop against a plain PEFT loop on padded batches.

    python -m tests.benchmarks.training_speed --output training_speed.json

Both train the same rank-8 adapter on all linear layers of the embedded model, on the same rows of `skills` in batches
of 8; steps alternate, so that a machine whose speed drifts treats both alike. Tokens are real ones, without padding.
The limit beside them is what the matrix products of forward and backward alone would allow at the speed of one large
product.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.types import RunMode

from lora_lab.adapters.attach import attach
from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.app.compose import Composer, config_loader
from lora_lab.data.encode import Encoded, encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.models.load import load_base
from lora_lab.models.shared_copy import shared_copy
from lora_lab.schema.trial import LAB_KEYS, Trial, read_trial
from lora_lab.train.forward import Together
from lora_lab.train.loop import tick
from lora_lab.train.member import member_of
from tests.benchmarks.machine_speed import product_gflops

CPU = torch.device("cpu")
BATCH = 8


def a_trial() -> Trial:
    """Rank 8 on all linear layers, fp32, 8 rows a step."""
    loader = config_loader()
    composer = Composer(loader, loader.load_configuration("config", [], RunMode.RUN))
    mapping = composer.compose(["target=all_linear", "training.max_steps=1000"]).mapping
    return read_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS})


def lab_stepper(trial: Trial, cache: Path) -> Callable[[], int]:
    """One step of the lab's loop per call; returns its real tokens."""
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device=CPU, cache=cache)
    attached = attach(shared_copy(base.model), trial)
    attached.model.train()
    member = member_of(trial, attached, rows_of(trial, base.tokenizer, cache), name="lab")
    trunk = Trunk(base.model)
    trunk.join(member.name, attached.model)
    return lambda: tick(Together(trunk), [member], on_step=lambda *_: None, timed=True)


def plain_stepper(trial: Trial, cache: Path) -> Callable[[], int]:
    """What a user writes by hand: rows in shuffled order, padded to the longest, logits of every token."""
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device=CPU, cache=cache)
    model = attach(base.model, trial).model.train()
    rows = rows_of(trial, base.tokenizer, cache)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=trial.learning_rate)
    pad = base.tokenizer.pad_token_id
    position = 0

    def step() -> int:
        nonlocal position
        chosen = [rows[order[(position + offset) % len(order)]] for offset in range(BATCH)]
        position += BATCH
        width = max(len(row.input_ids) for row in chosen)
        ids = torch.tensor([[*row.input_ids, *[pad] * (width - len(row.input_ids))] for row in chosen])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in chosen])
        labels = torch.tensor([[*row.loss_mask, *[False] * (width - len(row.loss_mask))] for row in chosen])
        model(input_ids=ids, attention_mask=mask, labels=torch.where(labels, ids, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(mask.sum())

    return step


def rows_of(trial: Trial, tokenizer: Any, cache: Path) -> list[Encoded]:
    """The training rows as tokens."""
    rows = load_rows(trial.data, cache=cache).train
    return list(encode_rows(rows, tokenizer, trial.data, vocab_size=49152).examples)


def measure(steps: int, cache: Path) -> dict[str, Any]:
    """Tokens per second of both, step by step in turn, the first step of each left out."""
    trial = a_trial()
    steppers = {"lora-lab": lab_stepper(trial, cache), "plain PEFT loop": plain_stepper(trial, cache)}
    speeds: dict[str, list[float]] = {name: [] for name in steppers}
    for index in range(steps + 1):
        for name, step in steppers.items():
            start = time.perf_counter()
            tokens = step()
            if index:
                speeds[name].append(tokens / (time.perf_counter() - start))
    gflops = product_gflops()
    # Forward and backward through frozen weights: 2 + 2 operations per weight of the layers and token.
    limit = gflops * 1e9 / (4 * 106_168_320)
    return {
        "steps": steps,
        "load_average": os.getloadavg()[0],
        "matrix_product_gflops": gflops,
        "limit_tokens_per_second": limit,
        "tokens_per_second": speeds,
        "median_tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
    }


def main() -> None:
    """Prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cache", type=Path, default=Path("lab/cache"))
    parser.add_argument("--output", type=Path, default=Path("training_speed.json"))
    options = parser.parse_args()
    result = measure(options.steps, options.cache)
    options.output.write_text(json.dumps(result, indent=2))
    limit = result["limit_tokens_per_second"]
    print(f"{'loop':<18}{'tokens/s':>10}{'of the limit':>14}")
    for name, speed in result["median_tokens_per_second"].items():
        print(f"{name:<18}{speed:>10.0f}{speed / limit:>13.0%}")
    print(f"limit {limit:.0f} tokens/s: {result['matrix_product_gflops']:.0f} GFLOP/s in one large product")


if __name__ == "__main__":
    main()
