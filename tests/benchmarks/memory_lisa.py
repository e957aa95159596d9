"""LISA against LoRA by prediction alone, beside two published comparisons; nothing is loaded.

python -m tests.benchmarks.memory_lisa --output memory_lisa.json

Neither comparison tells all of its set-up, so neither is a test of the prediction: what is unknown is swept or named,
and what follows from arithmetic is told apart from what does not. Exit code 1 where planning the
70B model took more than 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from lora_lab.app.compose import Composer, config_loader
from lora_lab.plan.prediction import LongestRows, Prediction
from lora_lab.predict.predictor import predict
from lora_lab.schema.trial import LAB_KEYS, read_trial

_GIGABYTE = 1e9
_LENGTHS = (256, 512, 1024)
_ONE_ROW = ("training.batch_size=1", "training.micro_batch_size=1")


@dataclass(frozen=True, slots=True)
class Pair:
    """Peaks that were published, in GB, of one model in fp32. model: overrides."""

    name: str
    model: tuple[str, ...]
    lisa: float
    lora: float


# The shape of Qwen/Qwen2.5-3B's config.json.
_QWEN = {
    "hidden_size": 2048,
    "num_layers": 36,
    "num_heads": 16,
    "num_kv_heads": 2,
    "head_dim": 128,
    "mlp_size": 11008,
    "vocab_size": 151936,
    "max_positions": 32768,
    "tied_embeddings": "true",
}
# The table beside the checkout, "Soup independent LISA check": gamma 2, K 20, LoRA r=16, an H100, Alpaca.
PAIRS = (
    Pair(
        "Qwen2.5-3B",
        ("model=qwen2_0_5b", *(f"model.shape.{key}={value}" for key, value in _QWEN.items())),
        lisa=19.37,
        lora=15.93,
    ),
    Pair("Llama-3.1-8B", ("model=llama3_8b",), lisa=52.14, lora=34.56),
)
# Counted there at 8B, "to the unit"; the one number of theirs that needs no more set-up than is known.
_TRAINABLE_OF_LISA = {"Llama-3.1-8B": 1_486_901_248}
UNKNOWN = "not told: row length, micro-batch, gradient checkpointing, autocast, LoRA's targets, AdamW's kernel"
_SIDES = {
    "LISA": ("method=lisa", "method.layers=2", "method.interval=20"),
    "LoRA qv": ("method=lora", "rank=16", "target=qv"),
    "LoRA all": ("method=lora", "rank=16", "target=all_linear"),
}
_SEVENTY = {
    "LISA, 2 layers": (("method=lisa", "method.layers=2"), 75.0),
    "LoRA, rank 128": (("method=lora", "rank=128", "target=all_linear_head", "target.embedding=true"), 79.0),
}
_DEVICES = 4
# Share by which a reading may differ and still be called near what was published.
_NEAR = 0.1
# Planning must not allocate what it plans.
_MOST_GIB = 2.0


class Planner:
    """Predictions of a step on one row, as CUDA counts."""

    def __init__(self) -> None:
        loader = config_loader()
        self._composer = Composer(loader, loader.load_configuration("config", [], RunMode.RUN))

    def predicted(self, *overrides: str, tokens: int) -> Prediction:
        """tokens: of the row; all count in the loss. Raises as `predict` does."""
        mapping = self._composer.compose([*overrides, *_ONE_ROW]).mapping
        trial = read_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS})
        return predict(trial, LongestRows((tokens,), (tokens,), "assumed"), device_kind="cuda", style="hf")


def pair_rows(planner: Planner, pair: Pair, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Of each length, with and without checkpointing: the peaks of all sides in GB, and LISA's over LoRA's.

    The step is the one that transformers' Trainer takes, as theirs is.
    """
    for checkpointing in ("off", "every_layer"):
        for tokens in lengths:
            told = {
                side: planner.predicted(
                    *pair.model, *lines, f"training.gradient_checkpointing={checkpointing}", tokens=tokens
                )
                for side, lines in _SIDES.items()
            }
            peaks = {side: one.peak_allocated_bytes / _GIGABYTE for side, one in told.items()}
            yield {
                "model": pair.name,
                "tokens": tokens,
                "checkpointing": checkpointing,
                "peak_gb": peaks,
                "place": {side: one.place for side, one in told.items()},
                "trainable": {side: one.trainable_parameters for side, one in told.items()},
                "held": {side: held_gb(one, own=side != "LISA") for side, one in told.items()},
                "ratio": {side: peaks["LISA"] / peaks[side] for side in _SIDES if side != "LISA"},
            }


def held_gb(one: Prediction, *, own: bool) -> dict[str, float]:
    """What fp32 training by AdamW holds, in GB, without and with gradients: theirs need not be alive at the peak.

    own: whether what is trained comes beside the base (an adapter) or is part of it.
    """
    states = one.base_bytes + 4 * one.trainable_parameters * (3 if own else 2)
    return {
        "weights_and_states_gb": states / _GIGABYTE,
        "with_gradients_gb": (states + 4 * one.trainable_parameters) / _GIGABYTE,
    }


def seventy_rows(planner: Planner, tokens: int) -> Iterator[dict[str, Any]]:
    """Llama-2-70B in bf16: what is alive after a step, on all GPUs and on one of them, beside what was published."""
    for name, (lines, published) in _SEVENTY.items():
        start = time.perf_counter()
        one = planner.predicted("model=llama2_70b", *lines, "training.precision=bf16", tokens=tokens)
        own = 0 if "LISA" in name else one.trainable_parameters
        # Theirs is in bf16 throughout: an adapter's own weights, a gradient, two states; two bytes each.
        total = one.base_bytes + 2 * (own + 3 * one.trainable_parameters)
        yield {
            "side": name,
            "published_gb": published,
            "weights_gb": one.base_bytes / _GIGABYTE,
            "trainable": one.trainable_parameters,
            "total_gb": total / _GIGABYTE,
            "one_of_four_gb": total / _DEVICES / _GIGABYTE,
            "peak_on_one_device_gb": one.peak_allocated_bytes / _GIGABYTE,
            "how": one.how,
            "seconds": time.perf_counter() - start,
        }


def peak_rss_gib() -> float:
    """The largest resident size of this process so far, in GiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**30 if sys.platform == "darwin" else size / 2**20


def pair_text(pair: Pair, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of one model, and what the published peaks leave beside weights, states and gradients."""
    lines = [
        f"{pair.name}, fp32, one row a step; published LISA {pair.lisa:.2f} GB, LoRA {pair.lora:.2f} GB, "
        f"{pair.lisa / pair.lora:.2f} times",
        f"  {'tokens':>6} {'checkpointing':<13} {'LISA':>6} {'LoRA qv':>8} {'LoRA all':>8} {'times qv':>8} {'all':>6}",
    ]
    for row in rows:
        peaks, ratio = row["peak_gb"], row["ratio"]
        lines.append(
            f"  {row['tokens']:>6} {row['checkpointing']:<13} {peaks['LISA']:>6.2f} {peaks['LoRA qv']:>8.2f} "
            f"{peaks['LoRA all']:>8.2f} {ratio['LoRA qv']:>8.2f} {ratio['LoRA all']:>6.2f}"
        )
    counted, predicted = _TRAINABLE_OF_LISA.get(pair.name), rows[0]["trainable"]["LISA"]
    if counted is not None:
        lines.append(f"  LISA trains {predicted:,} parameters; counted there: {counted:,}")
    ratios = [value for row in rows for value in row["ratio"].values()]
    within = "lies" if min(ratios) <= pair.lisa / pair.lora <= max(ratios) else "does NOT lie"
    lines.append(f"  predicted ratios: {min(ratios):.2f} to {max(ratios):.2f}; the published one {within} between them")
    for side, published in (("LISA", pair.lisa), ("LoRA qv", pair.lora), ("LoRA all", pair.lora)):
        held = rows[0]["held"][side]
        lines.append(
            f"  {side:<8} holds {held['weights_and_states_gb']:.2f} GB of weights and states, so the published peak "
            f"leaves {published - held['weights_and_states_gb']:.2f} GB; with all gradients "
            f"{published - held['with_gradients_gb']:.2f}"
        )
    return lines


def seventy_text(rows: Sequence[Mapping[str, Any]], tokens: int) -> list[str]:
    """The two sides of Llama-2-70B, and what can be said of them."""
    lines = [
        f"Llama-2-70B, bf16 throughout; weights alone {rows[0]['weights_gb']:.1f} GB. Published as read after one step "
        f"by memory_allocated(), over {_DEVICES} GPUs:",
        f"  {'':<15} {'trainable':>13} {'weights+gradients+states':>25} {'one of four':>12} {'published':>10} "
        f"{'our peak':>9}",
    ]
    for row in rows:
        lines.append(
            f"  {row['side']:<15} {row['trainable']:>13,} {row['total_gb']:>25.1f} {row['one_of_four_gb']:>12.1f} "
            f"{row['published_gb']:>10g} {row['peak_on_one_device_gb']:>9.1f}"
        )
    totals, told = [row["total_gb"] for row in rows], [row["published_gb"] for row in rows]
    near = [
        reading
        for row in rows
        for reading in ("total_gb", "one_of_four_gb")
        if abs(row[reading] / row["published_gb"] - 1) <= _NEAR
    ]
    whether = "Some reading comes near" if near else "Neither all of it nor an even quarter comes near"
    lines += [
        f"  {whether} (within {_NEAR:.0%}) what was published. The totals differ by "
        f"{abs(totals[0] - totals[1]):.1f} GB, the published ones by {abs(told[0] - told[1]):g} GB.",
        "  How layers were laid on the GPUs, and whose reading was taken, is not told; nothing more follows.",
        f"  Our peak: of our own program's LISA and LoRA (adapters in fp32) as Trainer takes the step, one row of "
        f"{tokens} tokens, all on one device.",
    ]
    return lines


def main() -> None:
    """Prints the tables and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one row length instead of three")
    parser.add_argument("--output", type=Path, default=Path("memory_lisa.json"))
    options = parser.parse_args()
    planner, lengths = Planner(), _LENGTHS[1:2] if options.quick else _LENGTHS
    before = peak_rss_gib()
    seventy = list(seventy_rows(planner, _LENGTHS[-1]))
    after = peak_rss_gib()
    print(*seventy_text(seventy, _LENGTHS[-1]), sep="\n")
    seconds = sum(row["seconds"] for row in seventy)
    print(
        f"  predicted in {seconds:.0f} s; largest resident size {after:.2f} GiB, {before:.2f} before the first "
        f"prediction (to stay under {_MOST_GIB:g})\n"
    )
    pairs = []
    for pair in PAIRS:
        rows = list(pair_rows(planner, pair, lengths))
        pairs += rows
        print(*pair_text(pair, rows), sep="\n", flush=True)
    print(f"  of both {UNKNOWN}")
    result = {"quick": options.quick, "peak_rss_gib": after, "seventy": seventy, "pairs": pairs, "unknown": UNKNOWN}
    options.output.write_text(json.dumps(result, indent=1, allow_nan=False))
    if after > _MOST_GIB:
        sys.exit(1)


if __name__ == "__main__":
    main()
