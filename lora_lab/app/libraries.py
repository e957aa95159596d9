"""The libraries that the lab stands on: what the doctor asks of each, and what follows where the answer is not good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lab.app.questions import Answer, Question
from lora_lab.report.checks import Check

# A first import from a slow disk, and CUDA's own start, may take a minute.
_SECONDS = 180.0
_NOTHING_RUNS = "nothing can be trained or scored"
_UNTRIED = "runs may fail or give other numbers"


@dataclass(frozen=True, slots=True)
class Library:
    """A question, and what follows. prevents: where there is no good answer; prevents_if_odd: where there is a concern
    about it. is_essential: whether nothing runs without it."""

    check: str
    function: str
    prevents: str
    advice: str
    is_essential: bool
    prevents_if_odd: str = _UNTRIED
    distribution: str | None = None
    modules: tuple[str, ...] = ()


LIBRARIES = (
    Library("torch", "torch_build", _NOTHING_RUNS, "pip install torch", is_essential=True),
    Library(
        "device",
        "devices",
        "no device is known to train on",
        "install torch for this machine: https://pytorch.org",
        is_essential=True,
        prevents_if_odd="runs use the CPU only",
    ),
    Library(
        "bitsandbytes",
        "bitsandbytes",
        "method=qlora, quantization=nf4|fp4, optimizer=adamw8bit|paged_adamw|paged_adamw8bit|lion cannot run",
        "pip install bitsandbytes",
        is_essential=False,
    ),
    Library(
        "transformers",
        "library",
        _NOTHING_RUNS,
        "pip install transformers",
        is_essential=True,
        distribution="transformers",
        modules=("transformers.models.auto.modeling_auto",),
    ),
    Library("peft", "library", _NOTHING_RUNS, "pip install peft", True, distribution="peft", modules=("peft",)),
    Library(
        "lm-eval",
        "library",
        _NOTHING_RUNS,
        "pip install 'lm_eval[hf]'",
        is_essential=True,
        distribution="lm_eval",
        modules=("lm_eval.evaluator", "lm_eval.models.huggingface"),
    ),
    Library(
        "runner",
        "imported",
        _NOTHING_RUNS,
        "install what is named there",
        is_essential=True,
        modules=("lora_lab.launch.local",),
    ),
)


def library_question(library: Library) -> Question:
    """The question that a process with torch in it answers."""
    arguments: dict[str, Any] = {}
    if library.modules:
        arguments["modules"] = list(library.modules)
    if library.distribution is not None:
        arguments["distribution"] = library.distribution
    return Question(f"library_checks:{library.function}", arguments, _SECONDS)


def library_check(library: Library, answer: Answer) -> Check:
    """The answer as a line of the doctor's."""
    if answer.trouble is not None:
        return Check(library.check, "missing", answer.trouble, library.prevents, library.advice)
    found: Mapping[str, Any] = answer.value
    if found["concern"] is None:
        return Check(library.check, "ok", found["fact"])
    return Check(library.check, "warning", found["fact"], library.prevents_if_odd, found["concern"])
