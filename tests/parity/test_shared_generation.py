"""Batched greedy decoding with shared prefixes against lm-eval's own generation: texts, and tokens computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model

from lora_lab.errors import EvaluationError
from lora_lab.evaluate import generation, lab_model
from lora_lab.evaluate.checked_model import CheckedModel
from lora_lab.evaluate.lab_model import LabModel
from lora_lab.models.random import byte_tokenizer
from tests.journey.program import single_thread
from tests.parity.test_prompts import FAMILIES, KINDS, N, adapted, network
from tests.tuner_bases import shaken

HEADER = "shot one. shot two. "
SHARED = [HEADER + tail for tail in ("a", "bb?", "the cat sat", "dog", "the end!", "x y z")]
UNLIKE = ["ab", "the cat sat on", "q", "nothing in common", "zz top"]
REQUESTS = {
    "shared": SHARED,
    "unlike": UNLIKE,
    "one": SHARED[:1],
    "same": ["all the same"] * 5,
    "cut": [*SHARED, HEADER + "x" * 70 + " tail", "y" * 80],
    "mixed": [*SHARED, *UNLIKE],
}


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    """Models this small gain nothing from a second core."""
    with single_thread():
        yield


@pytest.fixture(autouse=True)
def every_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of a few tokens are used too."""
    monkeypatch.setattr(generation, "LEAST_SAVED", 2)


def requests(contexts: list[str], until: list[str] | None = None, **settings: Any) -> list[Instance]:
    gen_kwargs = {"until": until or ["\n\n\n"], "max_gen_toks": 12, **settings}
    numbered = enumerate(contexts)
    return [Instance("generate_until", {}, (one, gen_kwargs), index, ("task", index, 1)) for index, one in numbered]


def texts(kind: type[CheckedModel], model: Any, given: list[Instance], batch_size: int = 3) -> list[str]:
    return kind(model, tokenizer=byte_tokenizer(64), batch_size=batch_size).generate_until(given)


class Tokens:
    """Counts the columns and rows that pass the first layer's attention, call by call."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[int, int]] = []
        norm = next(module for name, module in model.named_modules() if name.endswith(("input_layernorm", "ln_1")))
        norm.register_forward_pre_hook(lambda _module, inputs: self.calls.append(tuple(inputs[0].shape[:2])))

    @property
    def total(self) -> int:
        return sum(rows * columns for rows, columns in self.calls)


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches that lm-eval's own loop has generated."""
    seen: list[int] = []
    stock = CheckedModel._model_generate

    def noted(self: Any, context: Any, *args: Any, **settings: Any) -> Any:
        if isinstance(self, LabModel):
            seen.append(len(context))
        return stock(self, context, *args, **settings)

    monkeypatch.setattr(CheckedModel, "_model_generate", noted)
    return seen


@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_lm_evals(family: str, case: str, batch_size: int, own_path: list[int]) -> None:
    model = network(family)
    given = requests(REQUESTS[case])
    expected = texts(CheckedModel, model, given, batch_size)
    assert texts(LabModel, model, given, batch_size) == expected
    assert own_path == []
    assert case in ("one", "same") or len(set(expected)) > 1


@pytest.mark.parametrize("case", ["shared", "unlike"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens(kind: str, family: str, case: str, own_path: list[int]) -> None:
    """Keys and values without tokens cannot stand behind the padding of rows that share less than it."""
    model = adapted(kind, network(family))
    given = requests(REQUESTS[case])
    assert texts(LabModel, model, given) == texts(CheckedModel, model, given)
    assert bool(own_path) == (kind in ("prefix", "projected") and case == "unlike")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter(family: str) -> None:
    base = network(family)
    plain = texts(LabModel, base, requests(SHARED))
    model = shaken(get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))).eval()
    expected = texts(CheckedModel, model, requests(SHARED))
    assert texts(LabModel, model, requests(SHARED)) == expected != plain
    with model.disable_adapter():
        assert texts(LabModel, model, requests(SHARED)) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    model = network(family, dtype=torch.bfloat16)
    assert texts(LabModel, model, requests(SHARED)) == texts(CheckedModel, model, requests(SHARED))
