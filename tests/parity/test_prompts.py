"""Prompt, p- and prefix tuning against the model called by hand: virtual embeddings in front, or keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, MistralConfig

from lora_lab.adapters.prompts import (
    check_room,
    p_tuning_config,
    prefix_tuning_config,
    prompt_tuning_config,
    start_prompt,
    virtual_tokens,
)
from lora_lab.adapters.save import load_adapter, save_adapter
from lora_lab.errors import InputError
from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.models.random import byte_tokenizer, random_network
from lora_lab.train.checkpointing import enable_checkpointing
from tests.conftest import MakeTrial
from tests.unit.test_adapters_attach import load
from tests.unit.test_models_random import tiny_shape

pytestmark = pytest.mark.usefixtures("one_core")

N = 3
BASE = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "revision": None}
KINDS = ("prompt", "p_mlp", "p_lstm", "prefix", "projected")
FAMILIES = ("llama", "gpt2", "qwen2", "mistral", "windowed")


def network(family: str = "llama", *, dtype: torch.dtype = torch.float64, layers: int = 2, tied: bool = False) -> Any:
    """A frozen random model whose weights are large enough for attention to matter. windowed: a Mistral that looks
    back 6 tokens only. All but GPT-2 have two key-value heads for four queries."""
    if family == "windowed":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = AutoModelForCausalLM.from_config(
            MistralConfig(
                vocab_size=260, num_hidden_layers=layers, max_position_embeddings=64, sliding_window=6, **sizes
            )
        )
    else:
        shape = tiny_shape(family, tied=tied).model_copy(update={"num_layers": layers})
        model = random_network(shape, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.config.use_cache = False
    return model.to(dtype).requires_grad_(False).eval()


def config_of(kind: str, base: Any) -> Any:
    """The lab's configuration of a kind."""
    if kind == "prompt":
        return prompt_tuning_config(base, virtual_tokens=N, init="random", init_text=None, tokenizer=None, **BASE)
    if kind in ("p_mlp", "p_lstm"):
        encoder: Any = kind.removeprefix("p_")
        return p_tuning_config(base, virtual_tokens=N, encoder=encoder, encoder_hidden_size=8, encoder_layers=2, **BASE)
    return prefix_tuning_config(base, virtual_tokens=N, projection=kind == "projected", encoder_hidden_size=8, **BASE)


def adapted(kind: str, base: Any) -> Any:
    """A prompt adapter on `base`, as `adapters.attach` puts it there."""
    torch.manual_seed(1)
    model = get_peft_model(base, config_of(kind, base))
    start_prompt(model, "default", text=None, tokenizer=None)
    return model.eval()


def virtual(model: Any) -> Tensor:
    """What the virtual tokens are, from the encoder's own weights: [n, hidden size] or [n, 2 layers x key width]."""
    encoder = model.prompt_encoder["default"]
    out: Tensor = encoder.embedding.weight
    if hasattr(encoder, "lstm_head"):
        out = encoder.lstm_head(out[None])[0][0]
    for layer in getattr(encoder, "mlp_head", getattr(encoder, "transform", ())):
        out = layer(out)
    return out


def by_hand(model: Any, row: Tensor) -> Tensor:
    """Logits [length, vocabulary] of one row behind the virtual tokens, without PEFT's forward pass."""
    base, start = model.get_base_model(), virtual(model)
    if "prefix" not in str(model.peft_type.value).lower():
        embedded = torch.cat((start.to(base.dtype), base.get_input_embeddings()(row)))
        logits: Tensor = base(inputs_embeds=embedded[None]).logits
        return logits[0, N:]
    cache = DynamicCache()
    config = base.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    states = start.to(base.dtype).view(N, config.num_hidden_layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    for layer, (keys, values) in enumerate(states):
        cache.update(keys[None], values[None], layer)
    positions = torch.arange(N, N + len(row))[None]
    # A mask of ones has the library build the causal mask over prefix and row.
    mask = torch.ones(1, N + len(row), dtype=torch.long)
    out: Tensor = base(input_ids=row[None], past_key_values=cache, position_ids=positions, attention_mask=mask).logits
    return out[0]


def ragged() -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of 12, 5 and 8 tokens, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 256, (length,), generator=generator) for length in (12, 5, 8)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=256)
    lengths = torch.tensor([len(row) for row in rows])
    return rows, ids, (torch.arange(12)[None] < lengths[:, None]).long()


def loss_of(model: Any) -> Tensor:
    """The training loop's loss on the ragged rows, all tokens but the first of each."""
    _, ids, mask = ragged()
    loss_mask = mask.bool()
    loss_mask[:, 0] = False
    with loss_token_logits(model) as head:
        logits = head(input_ids=ids, attention_mask=mask, loss_mask=loss_mask)
    return cross_entropy(logits, ids[loss_mask], reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_as_by_hand(kind: str, family: str) -> None:
    model = adapted(kind, network(family))
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert all(name.startswith("prompt_encoder") for name in trained)
    expected = sum(cross_entropy(by_hand(model, row)[:-1], row[1:], reduction="sum") for row in ragged()[0])
    assert isinstance(expected, Tensor)
    gradients = torch.autograd.grad(expected, list(trained.values()))
    loss = loss_of(model)
    assert abs(float((loss - expected).detach())) < 1e-10
    loss.backward()  # type: ignore[no-untyped-call]
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
        assert (parameter.grad - gradient).abs().max() < 1e-10, name
    assert all(one.grad is None for one in model.get_base_model().parameters())
    plain = network(family)
    bare = sum(
        cross_entropy(plain(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum") for row in ragged()[0]
    )
    assert abs(float(expected.detach()) - float(bare)) > 0.1, "the virtual tokens are seen"


@pytest.mark.parametrize("mode", ["every_layer", 2, "sqrt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "windowed"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind: str, family: str, mode: str | int) -> None:
    """A prefix comes in a cache to which each layer adds; a layer that is computed twice must not add twice."""
    gradients = []
    for checkpointed in (False, True):
        base = network(family, layers=5)
        before = {name: one.clone() for name, one in base.state_dict().items()}
        model = adapted(kind, base).train()
        calls = count_calls(base)
        if checkpointed:
            enable_checkpointing(model, mode)
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        assert len(calls) == (10 if checkpointed else 5), "each layer once more in the backward pass"
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
        assert all(torch.equal(one, before[name]) for name, one in base.state_dict().items())
    first, second = gradients
    assert list(first) == list(second)
    assert all(name.startswith("prompt_encoder") for name in first)
    for name in first:
        assert first[name] is not None
        assert second[name] is not None
        assert first[name].abs().max() > 0
        assert (first[name] - second[name]).abs().max() < 1e-12, name


def count_calls(base: Any) -> list[None]:
    """Grows by one with every call of an attention layer."""
    calls: list[None] = []
    for name, module in base.named_modules():
        if name.endswith((".self_attn", ".attn")):
            module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_what_is_kept_between_the_layers_is_only_the_prefix() -> None:
    """Checkpointing saves nothing if the cache holds every layer's keys until the end."""
    base = network(layers=4)
    model = adapted("prefix", base).train()
    enable_checkpointing(model, "every_layer")
    seen: list[int] = []
    for layer in base.model.layers:
        layer.self_attn.register_forward_hook(
            lambda _module, _args, kwargs, _out: seen.extend(
                int(one.keys.shape[-2]) for one in kwargs["past_key_values"].layers
            ),
            with_kwargs=True,
        )
    loss_of(model)
    assert set(seen) == {N}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_disabled_is_the_base(kind: str, tied: bool) -> None:
    base = network(tied=tied)
    _, ids, mask = ragged()
    with torch.no_grad():
        plain = base(input_ids=ids, attention_mask=mask).logits
        model = adapted(kind, base)
        before = model(input_ids=ids, attention_mask=mask).logits
        assert virtual_tokens(model) == N
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)
            assert virtual_tokens(model) == 0
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_virtual_tokens_train_in_float32(make_trial: MakeTrial, cache: Path, kind: str, quantization: str) -> None:
    """On a bf16 base a step of 1e-4 would be rounded away."""
    trial = make_trial(f"quantization={quantization}", "training.precision=bf16")
    base = load(trial, cache)
    before = {name: one.clone() for name, one in base.state_dict().items()}
    model = adapted(kind, base).train()
    enable_checkpointing(model, "every_layer")
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert {one.dtype for one in trained.values()} == {torch.float32}
    assert all(name.startswith("prompt_encoder") for name in trained)
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0, name
    assert all(torch.equal(one, before[name]) for name, one in base.state_dict().items())


def trainable(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


@pytest.mark.parametrize(
    ("kind", "tokens", "published"), [("prefix", 200, 11_468_800), ("prefix", 50, 2_867_200), ("prompt", 200, 614_400)]
)
def test_published_counts_on_llama_3_2_3b(kind: str, tokens: int, published: int) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=3072,
                intermediate_size=8192,
                num_hidden_layers=28,
                num_attention_heads=24,
                num_key_value_heads=8,
                head_dim=128,
                max_position_embeddings=131072,
                tie_word_embeddings=True,
            )
        )
    config = config_of(kind, base)
    config.num_virtual_tokens = tokens
    assert trainable(get_peft_model(base, config)) == published


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_docstrings(family: str, tmp_path: Path) -> None:
    base = network(family)
    n, d, layers, h = N, 32, 2, 8
    k = 32 if family == "gpt2" else 16
    affine = lambda a, b: a * b + b  # noqa: E731
    expected = {
        "prompt": (n * d, n * d),
        "p_mlp": (n * d + affine(d, h) + affine(h, h) + affine(h, d), n * d),
        "p_lstm": (
            n * d + sum(2 * (4 * h * (i + h) + 8 * h) for i in (d, 2 * h)) + affine(2 * h, 2 * h) + affine(2 * h, d),
            n * d,
        ),
        "prefix": (2 * layers * k * n, 2 * layers * k * n),
        "projected": (n * k + affine(k, h) + affine(h, 2 * layers * k), 2 * layers * k * n),
    }
    for kind, (trained, saved) in expected.items():
        model = adapted(kind, base)
        assert trainable(model) == trained
        save_adapter(model, tmp_path / kind)
        again = load_adapter(network(family), tmp_path / kind)
        assert again.prompt_encoder["default"].embedding.weight.numel() == saved


def test_initial_weights_follow_from_torchs_global_generator() -> None:
    def weights(kind: str, seed: int) -> list[Tensor]:
        base = network()
        torch.manual_seed(seed)
        model = get_peft_model(base, config_of(kind, base))
        return [one for one in model.parameters() if one.requires_grad]

    for kind in KINDS:
        assert all(map(torch.equal, weights(kind, 3), weights(kind, 3)))
        assert not any(map(torch.equal, weights(kind, 3), weights(kind, 4)))


def test_a_start_from_the_vocabulary() -> None:
    base = network()
    config = prompt_tuning_config(base, virtual_tokens=4, init="vocabulary", init_text=None, tokenizer=None, **BASE)
    torch.manual_seed(5)
    rows = get_peft_model(base, config).prompt_encoder["default"].embedding.weight
    torch.manual_seed(5)
    torch.nn.Embedding(4, 32)  # PEFT draws one that it then replaces
    ids = torch.randint(0, 260, (4,))
    assert torch.equal(rows, base.get_input_embeddings().weight[ids].float())


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    byte_tokenizer(64).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("text", ["ab", "classify the tone of this text"])
def test_a_start_from_a_text_equals_pefts(text: str, tokenizer_folder: Path) -> None:
    """PEFT loads the tokenizer from its folder; ours is the object at hand."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    theirs = get_peft_model(
        network(dtype=torch.float32),
        PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=7,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(tokenizer_folder),
        ),
    )
    base = network(dtype=torch.float32)
    config = prompt_tuning_config(base, virtual_tokens=7, init="text", init_text=text, tokenizer=tokenizer, **BASE)
    ours = get_peft_model(base, config)
    start_prompt(ours, "default", text=text, tokenizer=tokenizer)
    embeddings = [model.prompt_encoder["default"].embedding.weight for model in (ours, theirs)]
    assert torch.equal(*embeddings)
    assert embeddings[0].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_start_from_a_text_is_the_base_with_that_text_in_front(kind: str, family: str) -> None:
    """Three virtual tokens from a text of two: the text and its beginning again."""
    base = network(family)
    row = torch.arange(40, 52)
    with torch.no_grad():
        text = torch.tensor([ord("h"), ord("i"), ord("h")])
        expected = base(input_ids=torch.cat((text, row))[None]).logits[0, 3:]
        model = get_peft_model(base, config_of(kind, base))
        start_prompt(model, "default", text="hi", tokenizer=byte_tokenizer(64))
        logits = model(input_ids=row[None], attention_mask=torch.ones(1, 12)).logits[0, -12:]
    assert (logits - expected).abs().max() < 1e-10
    assert not base.training


def test_the_text_is_on_record_and_no_tokenizer_is_needed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = network(dtype=torch.float32)
    model = get_peft_model(base, config_of("prompt", base))
    start_prompt(model, "default", text="hi", tokenizer=byte_tokenizer(64))
    save_adapter(model, tmp_path / "a")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("reaches for a tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    plain = PeftModel.from_pretrained(network(dtype=torch.float32), tmp_path / "a")
    assert (plain.peft_config["default"].prompt_tuning_init_text, plain.active_peft_config.prompt_tuning_init) == (
        "hi",
        "TEXT",
    )
    ours = load_adapter(network(dtype=torch.float32), tmp_path / "a")
    for loaded in (plain, ours):
        assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, virtual(model))


def test_texts_that_give_no_start() -> None:
    base, tokenizer = network(), byte_tokenizer(64)
    settings: dict[str, Any] = {"virtual_tokens": 3, "init": "text", **BASE}
    with pytest.raises(InputError, match=r"method.init_text: '' has no tokens"):
        prompt_tuning_config(base, init_text="", tokenizer=tokenizer, **settings)
    with pytest.raises(ValueError, match="need the text and the tokenizer"):
        prompt_tuning_config(base, init_text="a", tokenizer=None, **settings)
    for kind in ("p_mlp", "projected"):
        model = get_peft_model(network(), config_of(kind, base))
        with pytest.raises(InputError, match="an encoder makes these virtual tokens"):
            start_prompt(model, "default", text="a", tokenizer=tokenizer)


def test_a_prefix_of_zeros() -> None:
    base = network()
    config = prefix_tuning_config(base, virtual_tokens=2, projection=False, encoder_hidden_size=8, init="zero", **BASE)
    model = get_peft_model(base, config)
    assert not virtual(model).any()
    row = torch.arange(5)[None]
    with torch.no_grad():
        assert (model(input_ids=row).logits - base(input_ids=row).logits).abs().max() > 1e-3, "no identity"


@pytest.mark.parametrize("family", FAMILIES)
def test_room(family: str) -> None:
    """The tiny models have 64 positions; GPT-2 fails beyond them, others would go on with untrained ones."""
    base = network(family)
    check_room(base, 60, 4)
    check_room(adapted("prompt", network(family)), 60, 4)
    with pytest.raises(InputError, match=r"method.virtual_tokens: must be < 64, the 64 positions of \w+, got 64"):
        check_room(base, 64, 1)
    with pytest.raises(InputError, match=r"60 virtual tokens and a row of 5 tokens exceed .*data.max_length <= 4"):
        check_room(base, 60, 5)
    settings: dict[str, Any] = {"virtual_tokens": 64, "encoder_hidden_size": 8, **BASE}
    for make in (
        lambda: prompt_tuning_config(base, virtual_tokens=64, init="random", init_text=None, tokenizer=None, **BASE),
        lambda: p_tuning_config(base, encoder="mlp", encoder_layers=2, **settings),
        lambda: prefix_tuning_config(base, projection=False, **settings),
    ):
        with pytest.raises(InputError, match="must be < 64"):
            make()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_position_can_be_used(kind: str) -> None:
    """61 tokens behind 3 virtual ones fill GPT-2's table of 64 positions."""
    model = adapted(kind, network("gpt2"))
    row = torch.arange(61)
    check_room(model, virtual_tokens(model), len(row))
    with torch.no_grad():
        assert (model(input_ids=row[None]).logits[0, -61:] - by_hand(model, row)).abs().max() < 1e-10
