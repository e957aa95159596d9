"""The trials of `memory_measured`: each method, and around LoRA, full and quantized training each other setting.

Rows are short, as what is compared is bytes and not speed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from hydra.types import RunMode

from lora_lab.app.compose import Composer, config_loader
from lora_lab.plan.prediction import LongestRows
from lora_lab.schema.trial import LAB_KEYS, Trial, read_trial

# Every row is by so many tokens shorter than the one before it, so that padding, or its absence, has to be right.
_SHORTER = 7


@dataclass(frozen=True, slots=True)
class Case:
    """overrides: of the configuration, with spaces between. batch, micro_batch: rows of a step, and at a time. tokens:
    of the longest row; half of each row's count in the loss."""

    model: str
    overrides: str
    batch: int
    micro_batch: int
    tokens: int

    @property
    def name(self) -> str:
        """The trial in one line."""
        return f"{self.overrides or '(defaults)'}, {self.micro_batch} of {self.batch} rows x {self.tokens}"

    def trial(self) -> Trial:
        """The validated trial."""
        sizes = [f"training.batch_size={self.batch}", f"training.micro_batch_size={self.micro_batch}"]
        mapping = _composer().compose([*_MODELS[self.model], *self.overrides.split(), *sizes]).mapping
        return read_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS})

    def rows(self) -> LongestRows:
        """As many rows as a batch has, longest first."""
        lengths = tuple(self.tokens - _SHORTER * index for index in range(self.batch))
        return LongestRows(lengths, tuple(length // 2 for length in lengths), "made up")


_TWELVE = ("model=tiny_random", "model.shape.num_layers=12")
_MODELS = {
    "smollm2_135m": ("model=smollm2_135m",),
    "gpt2, 12 layers": (*_TWELVE, "model.shape.family=gpt2", "model.shape.num_kv_heads=4"),
    "qwen2, 12 layers": (*_TWELVE, "model.shape.family=qwen2"),
    "mistral, 12 layers": (*_TWELVE, "model.shape.family=mistral"),
}
_EVERY = "training.gradient_checkpointing=every_layer"
_SQRT = "training.gradient_checkpointing=sqrt"
_BF16 = "training.precision=bf16"
_DOUBLE = "quantization=nf4 quantization.double_quantization=true"
# By what a base is loaded as, so that it is loaded once: model, then overrides, batch, micro-batch, tokens.
_GRID: dict[str, list[tuple[str, int, int, int]]] = {
    "smollm2_135m": [
        # LoRA: ranks, targets, sizes, optimizers, checkpointing.
        ("", 4, 4, 64),
        ("rank=1 target=query", 4, 4, 128),
        ("rank=64 target=all_linear", 4, 2, 64),
        ("rank=16 dropout=0.1 target=all_linear_head model.tie_embeddings=false", 2, 2, 128),
        ("target=mlp", 4, 2, 128),
        ("target=attention", 1, 1, 256),
        ("target=embedding model.tie_embeddings=false", 2, 2, 64),
        ("model.tie_embeddings=false target=head", 2, 2, 64),
        (_EVERY, 4, 4, 256),
        (_SQRT, 4, 4, 128),
        (f"target=all_linear rank=256 {_EVERY}", 4, 1, 192),
        ("optimizer=sgd rank=128", 4, 4, 32),
        ("optimizer=lion target=all_linear", 2, 2, 96),
        ("optimizer=sophia", 2, 2, 64),
        ("optimizer=adamw8bit rank=64 target=mlp", 2, 1, 64),
        ("optimizer=paged_adamw target=all_linear", 2, 2, 64),
        ("optimizer=paged_adamw8bit", 2, 2, 64),
        # Its relatives and the other adapters.
        ("method=rslora rank=32 target=attention", 4, 4, 64),
        ("method=lora_plus target=all_linear", 4, 2, 64),
        ("method=dora", 4, 4, 64),
        (f"method=dora rank=16 target=all_linear {_EVERY}", 4, 2, 128),
        ("method=pissa", 2, 2, 64),
        ("method=olora rank=4", 2, 2, 64),
        ("method=adalora", 4, 4, 64),
        ("method=ia3 target=ia3", 4, 4, 128),
        ("method=prompt_tuning", 4, 2, 64),
        ("method=p_tuning", 2, 2, 64),
        ("method=prefix_tuning", 2, 2, 96),
        (f"method=prefix_tuning method.projection=true {_EVERY}", 2, 2, 64),
        ("method=bottleneck method.style=houlsby", 2, 2, 64),
        ("method=bottleneck method.style=parallel", 4, 2, 64),
        ("method=mov target=ia3", 2, 2, 64),
        ("method=molora method.experts=4 target=attention", 2, 2, 64),
        ("method=loramoe", 2, 2, 64),
        ("method=mola", 2, 2, 64),
        # The base's own weights.
        ("method=full", 2, 2, 64),
        (f"method=full {_EVERY}", 4, 2, 128),
        ("method=full optimizer=sgd", 4, 4, 128),
        ("method=full optimizer=adamw8bit", 2, 2, 32),
        ("method=freeze method.last_layers=3", 4, 4, 64),
        ("method=lisa", 4, 4, 64),
        (f"method=lisa method.layers=6 {_EVERY}", 4, 2, 128),
        ("method=galore rank=64", 2, 2, 64),
        # Other precisions; many CPUs are slow in bf16, so these rows are the shortest.
        (f"target=all_linear {_BF16}", 1, 1, 32),
        (f"method=full {_BF16}", 2, 1, 32),
        ("training.precision=fp64", 2, 2, 32),
        # Quantized bases.
        ("quantization=nf4", 4, 4, 64),
        (f"quantization=nf4 target=all_linear rank=64 {_EVERY}", 4, 2, 128),
        ("quantization=nf4 method=dora target=mlp", 2, 2, 64),
        (f"{_DOUBLE} target=all_linear", 2, 2, 64),
        (f"method=qlora {_BF16} target=attention", 2, 1, 32),
        ("quantization=fp4 method=bottleneck", 2, 2, 64),
        ("quantization=int8", 2, 2, 64),
        (f"quantization=int8 method=adalora {_EVERY}", 2, 2, 64),
        ("quantization=int8 method=ia3 target=ia3", 2, 1, 64),
    ],
    "gpt2, 12 layers": [
        ("target=all_linear", 4, 4, 40),
        ("target=attention rank=32 quantization=nf4", 4, 2, 96),
        (f"target=all_linear quantization=int8 {_BF16}", 4, 4, 40),
        (f"method=full {_EVERY}", 4, 2, 128),
        ("method=prefix_tuning", 2, 2, 64),
    ],
    "qwen2, 12 layers": [
        ("method=dora target=all_linear", 4, 4, 40),
        (f"rank=4 target=mlp {_EVERY}", 8, 2, 128),
        ("method=full optimizer=lion", 4, 4, 64),
        (f"quantization=nf4 {_BF16}", 4, 4, 128),
        ("method=galore rank=4", 4, 2, 64),
        (f"method=galore optimizer=adamw8bit {_EVERY}", 2, 1, 64),
        (f"method=dora {_BF16} {_EVERY}", 4, 4, 96),
        (f"quantization=int8 {_BF16} method=ia3 target=ia3", 4, 2, 64),
    ],
    "mistral, 12 layers": [
        ("target=all_linear_head", 4, 4, 40),
        ("method=rslora target=mlp optimizer=sgd", 4, 4, 128),
        ("method=molora target=attention", 2, 2, 64),
        (f"method=full {_BF16} {_SQRT}", 4, 4, 64),
        (f"method=lisa {_BF16}", 4, 4, 64),
        (f"{_DOUBLE} target=all_linear {_BF16}", 4, 4, 40),
        (f"{_DOUBLE} target=all_linear {_EVERY}", 4, 2, 64),
    ],
}
# Of each model, for --quick.
_QUICK = {
    "smollm2_135m": (0, 2, 8, 35, 40, 46),
    "gpt2, 12 layers": (0, 3),
    "qwen2, 12 layers": (0,),
    "mistral, 12 layers": (3,),
}


def cases(*, quick: bool) -> list[Case]:
    """All of them, or about ten that touch each kind of base."""
    return list(_quick() if quick else _all())


def _all() -> Iterator[Case]:
    for model, rows in _GRID.items():
        for overrides, batch, micro_batch, tokens in rows:
            yield Case(model, overrides, batch, micro_batch, tokens)


def _quick() -> Iterator[Case]:
    for model, places in _QUICK.items():
        for place in places:
            yield Case(model, *_GRID[model][place])


@functools.cache
def _composer() -> Composer:
    loader = config_loader()
    return Composer(loader, loader.load_configuration("config", [], RunMode.RUN))
