"""Batched greedy decoding with shared prefixes against lm-eval's own generation: texts, and tokens computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model

from lora_lab.errors import EvaluationError
from lora_lab.evaluate.checked_model import CheckedModel
from lora_lab.evaluate.greedy import decoder, row_cache
from lora_lab.evaluate.lab_model import LabModel
from lora_lab.models.random import byte_tokenizer
from tests.parity.test_prompts import FAMILIES, KINDS, N, adapted, network
from tests.tiers import mostly_slow
from tests.tuner_bases import shaken

pytestmark = pytest.mark.usefixtures("one_core")

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


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of a few tokens are used too, and caches grow every few tokens."""
    monkeypatch.setattr(decoder, "LEAST_SAVED", 2)
    monkeypatch.setattr(row_cache, "ROOM", 3)


def requests(contexts: list[str], until: list[str] | None = None, **settings: Any) -> list[Instance]:
    gen_kwargs = {"until": until or ["\n\n\n"], "max_gen_toks": 12, **settings}
    numbered = enumerate(contexts)
    return [Instance("generate_until", {}, (one, gen_kwargs), index, ("task", index, 1)) for index, one in numbered]


def texts(kind: type[CheckedModel], model: Any, given: list[Instance], batch_size: int = 3) -> list[str]:
    return kind(model, tokenizer=byte_tokenizer(64), batch_size=batch_size).generate_until(given)


class Tokens:
    """Rows and columns that pass the first layer, call by call."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[int, int]] = []
        norm = next(module for name, module in model.named_modules() if name.endswith(("input_layernorm", "ln_1")))
        norm.register_forward_pre_hook(lambda _module, inputs: self.calls.append(tuple(inputs[0].shape[:2])))


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
@pytest.mark.parametrize("batch_size", mostly_slow([1, 4], keep=[4]))
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


@pytest.mark.parametrize("kind", [None, "prompt"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_stop_strings(batch_size: int, kind: str | None, own_path: list[int]) -> None:
    """Of several tokens each, taken from the middle of what rows say; one is in no row."""
    base = network("llama")
    model = base if kind is None else adapted(kind, base)
    whole = texts(CheckedModel, model, requests(SHARED), batch_size)
    given = requests(SHARED, [whole[0][3:6], whole[1][5:7], "not there"])
    expected = texts(CheckedModel, model, given, batch_size)
    assert expected[0] == whole[0][: whole[0].index(whole[0][3:6])] != whole[0]
    assert texts(LabModel, model, given, batch_size) == expected
    assert own_path == []


def test_one_new_token() -> None:
    model = network("llama")
    given = requests(SHARED, max_gen_toks=1)
    assert texts(LabModel, model, given) == texts(CheckedModel, model, given)


def test_end_of_text_at_once() -> None:
    """The first token of the first row ends every row that says it; the others go on."""
    model = network("llama")
    whole = texts(CheckedModel, model, requests(SHARED), 6)
    model.generation_config.eos_token_id = [258, whole[0].encode()[0]]
    expected = texts(CheckedModel, model, requests(SHARED), 6)
    assert len(expected[0]) == 1 < max(map(len, expected))
    assert texts(LabModel, model, requests(SHARED), 6) == expected


def test_a_special_token_as_stop_string_is_lm_evals(own_path: list[int]) -> None:
    """lm-eval leaves it out of the text, which then depends on when the other rows end; alone, a row ends there."""
    model = network("llama")
    with torch.no_grad():
        model.lm_head.weight[259] = (
            2 * model.lm_head.weight[texts(CheckedModel, model, requests(SHARED), 6)[0].encode()[2]]
        )
    given = requests(SHARED, ["<turn>"])
    for batch_size in (1, 2):
        expected = texts(CheckedModel, model, given, batch_size)
        assert texts(LabModel, model, given, batch_size) == expected
        assert own_path == [] or batch_size > 1
    assert texts(CheckedModel, model, given, 1) != expected
    assert own_path in ([2], [2, 2], [2, 2, 2])


def test_after_one_such_stop_no_batch_is_tried_again() -> None:
    """A second try would compute the next batch twice as well."""
    model = network("llama")
    greedy = decoder.GreedyDecoder(model, byte_tokenizer(64))
    context, mask = torch.tensor([list(b"the cat"), list(b"the dog")]), torch.ones(2, 7, dtype=torch.long)
    answer = greedy.generate(context, mask, 10, ["not there"])
    assert answer is not None and answer.shape == (2, 10)
    with torch.no_grad():
        model.lm_head.weight[259] = 1e4 * model.lm_head.weight[answer[0, 7]]
    assert greedy.generate(context, mask, 10, ["<turn>"]) is None
    tokens = Tokens(model)
    assert greedy.generate(context, mask, 10, ["not there"]) is None
    assert tokens.calls == []


def test_only_the_last_logits_are_computed() -> None:
    model = network("gpt2")
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape[1]))
    texts(LabModel, model, requests(SHARED))
    assert set(seen) == {1}


def test_settings_that_are_lm_evals(own_path: list[int]) -> None:
    model = network("llama")
    plain = texts(LabModel, model, requests(SHARED))
    assert own_path == []
    model.generation_config.repetition_penalty = 5.0
    changed = texts(LabModel, model, requests(SHARED))
    assert changed == texts(CheckedModel, model, requests(SHARED)) != plain
    assert own_path == [3, 3]


def test_stock_engine(own_path: list[int]) -> None:
    LabModel(network("llama"), tokenizer=byte_tokenizer(64), batch_size=3, engine="stock").generate_until(
        requests(SHARED)
    )
    assert own_path == [3, 3]


def test_nan_logits_are_an_error() -> None:
    model = network("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(EvaluationError, match="task task: a logit is not finite while generating"):
        texts(LabModel, model, requests(SHARED))


def test_the_prefix_is_computed_once() -> None:
    """Two batches: the header of 20 tokens passes once, in one row; then what each row has of its own."""
    model = network("llama")
    tokens = Tokens(model)
    contexts = [HEADER + letters * 4 for letters in ("a", "b", "c", "d", "e", "f")]
    texts(LabModel, model, requests(contexts, max_gen_toks=1))
    assert tokens.calls == [(1, len(HEADER)), (3, 4), (3, 4)]


@pytest.mark.parametrize(("tail", "first"), [("aaaa", (3, 24)), ("aaa", (1, 4))])
def test_a_short_prefix_pays_where_attention_has_a_mask_anyway(tail: str, first: tuple[int, int]) -> None:
    """Rows of equal length need no mask. Here 4 of 24 columns are shared, below a third."""
    model = network("llama")
    tokens = Tokens(model)
    contexts = ["same" + letter * 20 for letter in "ab"]
    texts(LabModel, model, requests([*contexts, "same" + "c" * 16 + tail], max_gen_toks=1))
    assert tokens.calls[0] == first


def test_one_row_at_a_time_shares_it_too() -> None:
    model = network("llama")
    tokens = Tokens(model)
    contexts = [HEADER + "aaaa", HEADER + "bbb", HEADER + "cc"]
    texts(LabModel, model, requests(contexts, max_gen_toks=1), 1)
    assert tokens.calls == [(1, 24), (1, 3), (1, 2)]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_the_root(kind: str) -> None:
    """Those of prompt tuning pass once with the header; keys and values of prefix tuning never pass."""
    model = adapted(kind, network("llama"))
    tokens = Tokens(model)
    texts(LabModel, model, requests([HEADER + letters * 4 for letters in ("a", "b", "c", "d")], max_gen_toks=1), 2)
    assert tokens.calls == [(1, len(HEADER) + (N if kind == "prompt" else 0)), (2, 4), (2, 4)]


def test_rows_that_have_ended_are_left_out() -> None:
    """Every row costs its own new tokens but the last, whose successor nobody asks for."""
    model = network("llama")
    rows = [torch.tensor([list(text.encode())]) for text in SHARED]
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 256}
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **settings)[0, row.shape[1] :] for row in rows]
    ends = {258, *(int(new[at]) for new, at in zip(alone, (0, 2, 4), strict=False))}
    lengths = [next((at for at, one in enumerate(new.tolist(), 1) if one in ends), 12) for new in alone]
    assert len(set(lengths)) > 2
    model.generation_config.eos_token_id = sorted(ends)
    tokens = Tokens(model)
    texts(LabModel, model, requests(SHARED), 6)
    steps = [count for count, columns in tokens.calls[2:] if columns == 1]
    assert steps == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_a_cache_lives_as_long_as_the_call() -> None:
    """Changed weights between two calls change the texts."""
    model = network("llama")
    lm = LabModel(model, tokenizer=byte_tokenizer(64), batch_size=3)
    lm.generate_until(requests(SHARED))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    assert lm.generate_until(requests(SHARED)) == texts(CheckedModel, model, requests(SHARED))
