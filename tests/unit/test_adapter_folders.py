"""Adapter folders of every kind that is accepted: the same logits come back, what does not fit is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_lab.adapters.accepted import ACCEPTED
from lora_lab.adapters.prompts import match_precision
from lora_lab.adapters.save import load_adapter, save_adapter
from lora_lab.errors import InputError
from lora_lab.models.random import random_network
from tests.conftest import MakeTrial
from tests.unit.test_adapters_attach import load
from tests.unit.test_models_random import tiny_shape

pytestmark = pytest.mark.usefixtures("one_core")

IDS = torch.arange(24).reshape(2, 12)
# Families differ in how their matrices are laid out (Conv1D is transposed) and named.
QUERIES = {"llama": ["q_proj", "k_proj"], "qwen2": ["q_proj", "k_proj"], "gpt2": ["attn.c_attn"]}
LAST_OF_MLP = {"llama": "down_proj", "qwen2": "down_proj", "gpt2": "mlp.c_proj"}


def adalora(family: str, **changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=QUERIES[family],
        fan_in_fan_out=family == "gpt2",
        **{"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 6, **changes},
    )


def ia3(family: str) -> IA3Config:
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[*QUERIES[family], LAST_OF_MLP[family]],
        feedforward_modules=[LAST_OF_MLP[family]],
        fan_in_fan_out=family == "gpt2",
    )


CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": lambda family: LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=QUERIES[family]),
    "adalora": adalora,
    "ia3": ia3,
    "prompt": lambda _: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p_mlp": lambda _: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "p_lstm": lambda _: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda _: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "projected": lambda _: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
}
PROMPTS = ("prompt", "p_mlp", "p_lstm", "prefix", "projected")
# PEFT types of the table that the lab itself registers: their own files test them.
ROWS = {config("llama").peft_type.value for config in CONFIGS.values()}


def network(family: str = "llama", *, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    """A frozen random model whose weights are large enough for attention to matter."""
    model = random_network(tiny_shape(family, tied=tied), 0).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.requires_grad_(False).eval()


def attached(base: Any, config: Any, *, name: str = "default") -> Any:
    """`config` on `base` as `adapters.attach` leaves it, for configurations that follow from no trial."""
    model = get_peft_model(base, config, adapter_name=name)
    if config.is_prompt_learning:
        match_precision(model, name)
    for key, parameter in model.named_parameters():
        if "ranknum" in key:  # AdaLoRA's; PEFT sets it trainable on a bf16 base
            parameter.requires_grad_(False)
    return model


def adapted(base: Any, config: Any, *, name: str = "default") -> Any:
    """`config` on `base`, and every adapter weight moved, as training would."""
    model = attached(base, config, name=name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of the rows' own tokens, in float64."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, -ids.shape[1] :].double()


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def settings_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def configure(folder: Path, **values: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings_of(folder) | values))


def test_every_kind_of_peft_in_the_table_is_tested() -> None:
    assert {"LORA", "ADALORA", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"} == ROWS
    assert set(ACCEPTED) >= ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_logits_come_back(kind: str, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(network(family, dtype=dtype), CONFIGS[kind](family))
    logits = logits_of(model)
    assert far(logits, logits_of(network(family, dtype=dtype))) > 1e-2, "the adapter does something"
    save_adapter(model, tmp_path / "a")
    ours = load_adapter(network(family, dtype=dtype), tmp_path / "a")
    plain = PeftModel.from_pretrained(network(family, dtype=dtype), tmp_path / "a").eval()
    # A projected prefix is computed row by row in training and for one row when it is saved.
    assert far(logits_of(ours), logits) < {torch.float32: 1e-5, torch.bfloat16: 1e-9, torch.float64: 1e-12}[dtype]
    # PEFT keeps virtual tokens in float32, whatever the base.
    assert far(logits_of(plain), logits) < (1e-4 if dtype == torch.float64 else 1e-5)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not ours.training
    save_adapter(ours, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_a_four_bit_base(make_trial: MakeTrial, cache: Path, tmp_path: Path, kind: str) -> None:
    precision = "fp32" if kind == "ia3" else "bf16"  # IA3 on a bf16 one has a file of its own
    trial = make_trial("quantization=nf4", f"training.precision={precision}")
    model = adapted(load(trial, cache), CONFIGS[kind]("llama"))
    logits = logits_of(model)
    save_adapter(model, tmp_path / "a")
    assert far(logits_of(load_adapter(load(trial, cache), tmp_path / "a")), logits) < 1e-6
    plain = PeftModel.from_pretrained(load(trial, cache), tmp_path / "a").eval()
    assert far(logits_of(plain), logits) < 1e-6
    assert far(logits_of(load(trial, cache).eval()), logits) > 1e-3


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_encoder_is_dropped(kind: str, tmp_path: Path) -> None:
    model = adapted(network(), CONFIGS[kind]("llama"))
    save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    layers, keys, hidden = 2, 2 * 8, 32
    expected = (3, 2 * layers * keys) if kind in ("prefix", "projected") else (3, hidden)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {"prompt_embeddings": expected}


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_more_adapter_of_the_kind(kind: str, tmp_path: Path) -> None:
    save_adapter(adapted(network(), CONFIGS[kind]("llama")), tmp_path / "a")
    alone = logits_of(load_adapter(network(), tmp_path / "a"))
    torch.manual_seed(1)
    model = adapted(network(), CONFIGS[kind]("llama"), name="mine")
    before = logits_of(model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    load_adapter(model, tmp_path / "a", name="other")
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert torch.equal(logits_of(model), before), "not yet active"
    model.set_adapter("other", inference_mode=True)
    assert far(logits_of(model), alone) < 1e-5
    model.set_adapter("mine")
    assert torch.equal(logits_of(model), before)
    with pytest.raises(InputError, match='an adapter "other" already'):
        load_adapter(model, tmp_path / "a", name="other")


@pytest.mark.parametrize(("carried", "added"), [("lora", "prompt"), ("prompt", "lora"), ("prefix", "prompt")])
def test_kinds_do_not_mix(carried: str, added: str, tmp_path: Path) -> None:
    save_adapter(adapted(network(), CONFIGS[added]("llama")), tmp_path / "a")
    model = adapted(network(), CONFIGS[carried]("llama"))
    before = logits_of(model)
    with pytest.raises(InputError, match=r"carries [A-Z_]+, to which no [A-Z_]+ can be added"):
        load_adapter(model, tmp_path / "a", name="other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model), before)


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "no tokens": ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens: expected an integer >= 1, got 0"),
    "true tokens": ("prompt", {"num_virtual_tokens": True}, "num_virtual_tokens: expected an integer"),
    "other number of tokens": ("prompt", {"num_virtual_tokens": 4}, r"is \(3, 32\), the model needs \(4, 32\)"),
    "other init": ("prompt", {"prompt_tuning_init": "EVIL"}, "expected one of TEXT, SAMPLE_VOCAB"),
    "tokenizer code": ("prompt", {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs: not supported"),
    "two submodules": ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules: expected one of 1"),
    "another width": ("prompt", {"token_dim": 64}, "made for token_dim 64, the model has 32"),
    "another depth": ("prefix", {"num_layers": 3}, "made for num_layers 3, the model has 2"),
    "other heads": ("prefix", {"num_attention_heads": 4}, "made for num_attention_heads 4, the model has 2"),
    "modules to save": ("prompt", {"modules_to_save": ["lm_head"]}, "modules_to_save: not supported"),
    "other task": ("prompt", {"task_type": "SEQ_CLS"}, "task_type: expected one of CAUSAL_LM"),
    "auto mapping": ("prefix", {"auto_mapping": {"parent_library": "evil"}}, "auto_mapping: it can make PEFT import"),
    "unknown": ("p_mlp", {"evil": 1}, "evil: unknown setting"),
    "encoder": ("p_mlp", {"encoder_reparameterization_type": "GRU"}, "expected one of MLP, LSTM"),
    "dropout": ("p_lstm", {"encoder_dropout": 1.0}, "encoder_dropout: expected a number >= 0 and < 1"),
    "projection": ("prefix", {"prefix_projection": "yes"}, "prefix_projection: expected true or false"),
    "ia3 pattern": ("ia3", {"feedforward_modules": "(a+)+$"}, "feedforward_modules: expected a list of module names"),
    "ia3 target": ("ia3", {"target_modules": ["nope"], "feedforward_modules": []}, "does not fit the model"),
    "ia3 outside": ("ia3", {"target_modules": ["q_proj"]}, "does not fit the model: .*subset"),
    "half fits": ("ia3", {"target_modules": ["q_proj", "layers.1.mlp"], "feedforward_modules": []}, "does not fit"),
    "bias": ("lora", {"bias": "all"}, "bias: expected one of none"),
    "other kind": ("lora", {"peft_type": "IA3"}, "r: not|r: unknown setting"),
    "rank of a pattern": ("lora", {"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: expected an integer >= 1"),
    "alora": ("lora", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens: not supported"),
    "kind is a list": ("lora", {"peft_type": ["LORA"]}, "no such type"),
    "no schedule": ("adalora", {"total_step": None}, "total_step: expected an integer"),
    "schedule": ("adalora", {"tinit": 9}, "does not fit the model"),
    "mask": ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [1, 0]}}, "list of true and false"),
    "mask of nothing": ("adalora", {"rank_pattern": {"nope.lora_E": [True] * 4}}, "1 names without a layer: nope"),
    "short mask": (
        "adalora",
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}},
        "expected 4 entries, got 1",
    ),
    "other rank": ("adalora", {"init_r": 5}, "rank 5 in adapter_config.json, but 4 in the weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    kind, changes, message = REFUSED[case]
    save_adapter(adapted(network(), CONFIGS[kind]("llama")), tmp_path / "a")
    configure(tmp_path / "a", **changes)
    base = network()
    modules = dict(base.named_modules())
    logits = logits_of(base)
    with pytest.raises(InputError, match=message):
        load_adapter(base, tmp_path / "a")
    assert {name: module for name, module in base.named_modules() if modules.get(name) is not module} == {}
    assert torch.equal(logits_of(base), logits)
    model = adapted(network(), CONFIGS[kind]("llama"), name="mine")
    before = logits_of(model)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=message):
        load_adapter(model, tmp_path / "a", name="other")
    assert list(model.peft_config) == ["mine"]
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits_of(model), before)


def test_no_tokenizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapted(network(), CONFIGS["prompt"]("llama")), tmp_path / "a")
    configure(
        tmp_path / "a",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="classify",
        tokenizer_name_or_path="evil/repository",
    )

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("reaches for a tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    load_adapter(network(), tmp_path / "a")


def trained_adalora(base: Any, config: AdaLoraConfig, *, steps: int, name: str = "default") -> Any:
    """AdaLoRA as PEFT says it is to be trained; with steps = total_step the budget has reached its target."""
    model = attached(base, config, name=name).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for step in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adalora_after_its_budget_was_cut(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained_adalora(network(family, dtype=dtype), adalora(family), steps=8)
    pattern = copy.deepcopy(model.peft_config["default"].rank_pattern)
    ranks = [sum(mask) for mask in pattern.values()]
    assert sum(ranks) < 4 * len(ranks)
    logits = logits_of(model)
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits_of(model), logits)
    assert model.peft_config["default"].rank_pattern == pattern
    settings = settings_of(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    on_disk = sum(len(tensor) for key, tensor in tensors.items() if key.endswith("lora_E"))
    if dtype == torch.float32:
        assert settings["rank_pattern"] == {key.removesuffix(".default"): mask for key, mask in pattern.items()}
        assert on_disk == sum(ranks)
    else:
        assert settings["rank_pattern"] is None
        assert on_disk == 4 * len(ranks)
    for loaded in (
        load_adapter(network(family, dtype=dtype), tmp_path / "a", name="layers"),
        PeftModel.from_pretrained(network(family, dtype=dtype), tmp_path / "a").eval(),
    ):
        assert far(logits_of(loaded), logits) < 1e-5
    save_adapter(load_adapter(network(family, dtype=dtype), tmp_path / "a"), tmp_path / "again")
    assert settings_of(tmp_path / "again") == settings


def test_adalora_that_moved_since_it_was_pruned(tmp_path: Path) -> None:
    """PEFT would cut out what the last step has brought back."""
    model = trained_adalora(network(), adalora("llama"), steps=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter[0] = 0.5
    logits = logits_of(model)
    save_adapter(model, tmp_path / "a")
    assert far(logits_of(load_adapter(network(), tmp_path / "a")), logits) < 1e-5
    assert far(logits_of(PeftModel.from_pretrained(network(), tmp_path / "a").eval()), logits) < 1e-5


def test_adalora_that_peft_has_cut_on_a_half_precision_base(tmp_path: Path) -> None:
    """PEFT rounds the cut weights to bf16; ours are those of the file."""
    model = trained_adalora(network(dtype=torch.bfloat16), adalora("llama"), steps=8)
    logits = logits_of(model)
    model.save_pretrained(tmp_path / "a")
    assert settings_of(tmp_path / "a")["rank_pattern"]
    ours = load_adapter(network(dtype=torch.bfloat16), tmp_path / "a")
    assert {parameter.dtype for name, parameter in ours.named_parameters() if "lora_" in name} == {torch.float32}
    assert far(logits_of(ours), logits) < 1e-5
    plain = PeftModel.from_pretrained(network(dtype=torch.bfloat16), tmp_path / "a").eval()
    assert far(logits_of(plain), logits) > 1e-3, "PEFT has learnt it: write the cut weights on this base too"
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, parameter in ours.named_parameters():
        key = name.removesuffix(".default")
        if key in tensors:
            assert torch.equal(parameter, tensors[key])


def test_a_cut_adalora_beside_one_in_training(tmp_path: Path) -> None:
    """PEFT freezes the active adapter where it cuts another one."""
    save_adapter(trained_adalora(network(), adalora("llama"), steps=8), tmp_path / "a")
    alone = logits_of(load_adapter(network(), tmp_path / "a"))
    model = adapted(network(), adalora("llama"), name="mine")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    before = logits_of(model)
    load_adapter(model, tmp_path / "a", name="other")
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert torch.equal(logits_of(model), before)
    model.set_adapter("other", inference_mode=True)
    assert far(logits_of(model), alone) < 1e-5


def test_a_model_with_an_adapter_named_like_a_layer_is_saved(tmp_path: Path) -> None:
    model = trained_adalora(network(), adalora("llama"), steps=8, name="model")
    logits = logits_of(model)
    save_adapter(model, tmp_path / "a", name="model")
    assert far(logits_of(load_adapter(network(), tmp_path / "a")), logits) < 1e-5


def test_a_broken_tensor_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(network(), CONFIGS["prompt"]("llama")), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.full((3, 32), float("nan"))}, file)
    with pytest.raises(InputError, match="1 of 1 tensors hold NaN"):
        load_adapter(network(), tmp_path / "a")
