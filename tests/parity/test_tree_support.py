"""Which models a token tree can score: the accepted agree with single rows, the others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    BertConfig,
    BertLMHeadModel,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_lab.evaluate.tree import support
from lora_lab.evaluate.tree.passes import Budget, Costs
from lora_lab.evaluate.tree.probe import why_probe_fails
from lora_lab.evaluate.tree.scores import plan_rows, score_plan
from lora_lab.evaluate.tree.support import why_not_tree
from lora_lab.evaluate.tree.token_tree import ScoredRow
from tests.tree_families import CONTEXT, INVALID, VALID, VOCABULARY, WINDOWED, random_rows, tiny_model

pytestmark = pytest.mark.usefixtures("one_core")

DEPTH = 40
# Plans that keep prefixes, that repeat them, and that compute whole trees in one row.
PLANS = [
    (Budget(96, 32), Costs(0.0, 0.0)),
    (Budget(96, 32), Costs(0.01, 1000.0)),
    (Budget(4096, 4096), Costs(0.0, 10_000.0)),
]


def single_rows(model: Any, rows: list[ScoredRow]) -> list[float]:
    """Each request by itself, with no mask: the definition of what is to be computed."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.tokens])).logits[0, -len(row.targets) :]
        found.append(float(logits.log_softmax(-1)[torch.arange(len(row.targets)), list(row.targets)].sum()))
    return found


def family(name: str, **changes: Any) -> Any:
    return tiny_model(*VALID[name], **changes)


@pytest.mark.parametrize("name", VALID)
def test_accepted_and_right(name: str) -> None:
    model = family(name)
    assert why_not_tree(model, depth=DEPTH) is None
    rows = random_rows(1, 40, longest=DEPTH)
    expected = single_rows(model, rows)
    kinds = set()
    for budget, costs in PLANS:
        plan = plan_rows(rows, budget, costs)
        kinds |= {(one.keep, one.causal, len(one.rows) > 1, one.prefix > 0) for one in plan.passes}
        assert [value for value, _ in score_plan(model, plan).answers] == pytest.approx(expected, abs=1e-4, rel=0)
    assert {(True, True, False, False), (False, False, True, True)} <= kinds  # kept, and rows below it


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_below_the_depth(name: str) -> None:
    """The key and its value are named; a window of just the depth is enough, for the probe and for the scores."""
    key = WINDOWED[name]
    model = family(name, **{key: DEPTH})
    assert why_not_tree(model, depth=DEPTH) is None
    rows = [ScoredRow(row.tokens, row.targets) for row in random_rows(2, 20, longest=DEPTH)]
    values = [value for value, _ in score_plan(model, plan_rows(rows, *PLANS[0])).answers]
    assert values == pytest.approx(single_rows(model, rows), abs=1e-4, rel=0)
    why = why_not_tree(model, depth=DEPTH + 1)
    assert why is not None
    assert f"{key} of {DEPTH}" in why and str(DEPTH + 1) in why


def test_windows_that_no_layer_uses() -> None:
    off = family("qwen2", use_sliding_window=False, sliding_window=4)
    full = family("gemma2", sliding_window=4, layer_types=["full_attention"] * 2)
    none = family("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    some = family("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    for model in (off, full, none):
        assert why_not_tree(model, depth=DEPTH) is None
    assert "sliding_window of 4" in str(why_not_tree(some, depth=DEPTH))


CAUSES = {
    "gpt_neo": "mask of its own",
    "mpt": "ALiBi",
    "bloom": "takes no position_ids",
    "falcon_alibi": "ALiBi",
    "mamba": "linear_attention",
    "jamba": "linear_attention",
    "qwen3_next": "linear_attention",
    "lfm2": "conv",
    "recurrent_gemma": "linear_attention",
    "rwkv": "recurrent state",
}


def invalid(name: str, **changes: Any) -> Any:
    try:
        return tiny_model(*INVALID[name], **changes)
    except ImportError as error:
        pytest.skip(f"needs what is not installed: {error}")


@pytest.mark.parametrize("name", INVALID)
def test_refused_by_name(name: str) -> None:
    assert CAUSES[name] in str(why_not_tree(invalid(name), depth=DEPTH))


def test_windows_over_places_in_the_row() -> None:
    """GPT-Neo cuts by place and not by depth, so a row that is longer than a window wide enough for the depth is wrong;
    without a window its mask of n_positions places still ends there."""
    assert "window_size of 8" in str(why_not_tree(tiny_model(*INVALID["gpt_neo"], window_size=8), depth=DEPTH))
    plain = tiny_model(*INVALID["gpt_neo"], attention_types=[[["global"], 2]], window_size=8)
    assert "mask of its own" in str(why_not_tree(plain, depth=DEPTH))


@pytest.mark.parametrize("name", [*INVALID, *WINDOWED])
def test_the_probe_alone_finds_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is silently wrong within the probe's length passes it, whatever its configuration says."""
    changes = {WINDOWED[name]: 16} if name in WINDOWED else {}
    model = family(name, **changes) if changes else invalid(name, **({"window_size": 16} if name == "gpt_neo" else {}))
    monkeypatch.setattr(support, "_CHECKS", ())
    monkeypatch.setattr(support, "windows", lambda sections: {})
    assert "probe" in str(why_not_tree(model, depth=DEPTH))


def test_encoder_decoders_and_models_that_are_no_causal_lm() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1))
    assert "encoder-decoder" in str(why_not_tree(t5, depth=DEPTH))
    headless = tiny_model(*VALID["llama"], make=AutoModel.from_config)
    assert "no causal language model" in str(why_not_tree(headless, depth=DEPTH))
    labels = tiny_model(*VALID["gpt2"], make=GPT2ForSequenceClassification._from_config)
    assert "no causal language model" in str(why_not_tree(labels, depth=DEPTH))
    assert "no model of transformers" in str(why_not_tree(torch.nn.Linear(2, 2), depth=DEPTH))


def test_bidirectional_attention() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    bert = {**sizes, "num_attention_heads": 4}
    masked = tiny_model("BertConfig", bert, make=AutoModelForMaskedLM.from_config)
    assert "no causal language model" in str(why_not_tree(masked, depth=DEPTH))
    # A decoder's class with an encoder's attention: no configuration key says so for certain.
    encoder = BertLMHeadModel(BertConfig(**bert, is_decoder=False)).eval()
    assert why_not_tree(encoder, depth=DEPTH) is not None
    gemma = family("gemma3_text", use_bidirectional_attention=True)
    assert "bidirectional" in str(why_not_tree(gemma, depth=8))


def test_attention_implementations() -> None:
    model = family("llama")
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in str(why_not_tree(model, depth=DEPTH))
    eager = family("llama")
    eager.set_attn_implementation("eager")
    assert why_not_tree(eager, depth=DEPTH) is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_depend_on_the_row(kind: str) -> None:
    """Beyond their limit the longest row of a call sets the frequencies of all, which no short probe can see."""
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        parameters |= {"original_max_position_embeddings": 32, **factors}
    model = family("llama", rope_parameters=parameters, max_position_embeddings=CONTEXT if kind == "longrope" else 32)
    assert why_not_tree(model, depth=32) is None
    assert kind in str(why_not_tree(model, depth=33))


def test_nested_configuration() -> None:
    """A model of text and images keeps its window in the part about text."""
    text = {**VALID["gemma3_text"][1], "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    settings = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": 299}
    model = tiny_model("Gemma3Config", settings, make=AutoModelForImageTextToText.from_config)
    assert isinstance(model, PreTrainedModel)
    assert "sliding_window of 8" in str(why_not_tree(model, depth=DEPTH))


def test_a_hidden_mistake_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama that counts positions by itself, whatever it is told: no key of its configuration is unusual."""
    model = family("llama")
    rotary = model.model.rotary_emb
    own = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: own(x, torch.arange(x.shape[1])[None]))
    assert "differ by up to" in str(why_probe_fails(model, length=24))


def test_out_of_memory_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")

    def refuse(*_args: object, **_settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model, "forward", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        why_not_tree(model, depth=DEPTH)
