"""Mixture of vectors against its formula, put on a plain network by hooks, against IA3, and in PEFT's ways of use."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_lab.adapters.ia3 import ia3_sites
from lora_lab.adapters.mov import MovConfig, MovLayer
from lora_lab.train.checkpointing import enable_checkpointing
from tests.tuner_bases import (
    FAMILIES,
    IDS,
    close,
    fresh_logits,
    loss_and_gradients,
    network,
    quantized,
    same,
    shaken,
    shape,
    trained_names,
)

FP64 = torch.float64
INPUTS = ["site_input", "site_output"]


def sites(base: Any) -> list[str]:
    """Key, value (GPT-2: the fused layer) and the last layer of the MLP, in the model's order."""
    ends = (".c_attn", ".mlp.c_proj") if base.config.model_type == "gpt2" else (".k_proj", ".v_proj", ".down_proj")
    return [name for name, _ in base.named_modules() if name.endswith(ends)]


def config(base: Any, **settings: Any) -> MovConfig:
    names = sites(base)
    feedforward = ia3_sites(base, names)
    fields = {"num_experts": 3, "target_modules": names, "feedforward_modules": feedforward, **settings}
    return MovConfig(task_type="CAUSAL_LM", **fields)


def adapted(base: Any, **settings: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(base, config(base, **settings)).eval()


def layers_of(model: Any) -> dict[str, MovLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, MovLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def routing(layer: Any, u: Tensor, name: str = "default") -> Tensor:
    """softmax(W_r u), written out, in float32 or better."""
    u = u if u.dtype == FP64 else u.float()
    z = torch.einsum("...d,nd->...n", u, layer.mov_router[name])
    e = torch.exp(z - z.amax(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


def mixed(layer: Any, u: Tensor, name: str = "default") -> Tensor:
    """sum_i s_i l_i."""
    s = routing(layer, u, name)
    return sum(s[..., i, None] * layer.mov_vectors[name][i] for i in range(s.shape[-1]))


def hooked(base: Any, model: Any, *, router_input: str) -> None:
    """Puts the vectors of `model` on the plain network `base`."""
    by_output = router_input == "site_output"
    for name, layer in layers_of(model).items():
        module = base.get_submodule(name)
        if name.endswith((".mlp.c_proj", ".down_proj")):
            entering: list[Tensor] = []

            def note(_mlp: nn.Module, args: Any, entering: list[Tensor] = entering) -> None:
                entering[:] = args

            def scale_input(_module: nn.Module, args: Any, layer: Any = layer, kept: list[Tensor] = entering) -> Any:
                v = args[0]
                return ((v * mixed(layer, v if by_output else kept[0])).to(v.dtype),)

            base.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(note)
            module.register_forward_pre_hook(scale_input)
        else:

            def scale_output(_module: nn.Module, args: Any, v: Tensor, layer: Any = layer) -> Tensor:
                return (v * mixed(layer, v if by_output else args[0])).to(v.dtype)

            module.register_forward_hook(scale_output)


class Notes:
    """Stands for the routing log."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Tensor, Tensor]] = []

    def note(self, name: str, probabilities: Tensor, weights: Tensor) -> None:
        self.rows.append((name, probabilities, weights))


def listening(model: Any) -> Notes:
    notes = Notes()
    for layer in layers_of(model).values():
        layer.routing_log, layer.routing_adapter = notes, "default"
    return notes


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_the_formula(family: str, router_input: str) -> None:
    model = shaken(adapted(network(family, FP64), router_input=router_input), amount=0.5)
    base = network(family, FP64)
    plain = base(input_ids=IDS).logits.detach()
    hooked(base, model, router_input=router_input)
    logits, gradients = loss_and_gradients(model)
    expected = base(input_ids=IDS).logits
    wanted = torch.autograd.grad(expected.square().mean(), list(trained_names(model).values()))
    assert (logits - plain).abs().max() > 1e-3
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    close([logits, *gradients], [expected.detach(), *wanted], atol=1e-11)


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("experts", [1, 2, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP64])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_base_at_the_start(family: str, dtype: torch.dtype, experts: int, router_input: str) -> None:
    base = network(family, dtype)
    before = base(input_ids=IDS).logits.detach()
    model = adapted(base, num_experts=experts, router_input=router_input)
    atol = {torch.float32: 1e-6, torch.bfloat16: 0.0, FP64: 1e-14}[dtype]
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=atol)
    assert {p.dtype for p in trained_names(model).values()} == {FP64 if dtype == FP64 else torch.float32}
    routers = torch.cat([p.flatten() for name, p in trained_names(model).items() if "mov_router" in name])
    vectors = [p for name, p in trained_names(model).items() if "mov_vectors" in name]
    assert all(bool((vector == 1).all()) for vector in vectors)
    assert routers.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(routers.mean().item()) < 0.003


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_one_vector_is_pefts_ia3(family: str, router_input: str) -> None:
    model = shaken(adapted(network(family, FP64), num_experts=1, router_input=router_input), amount=0.5)
    base = network(family, FP64)
    names = sites(base)
    settings = {"feedforward_modules": ia3_sites(base, names), "fan_in_fan_out": family == "gpt2"}
    ia3 = get_peft_model(base, IA3Config(target_modules=names, **settings)).eval()
    vectors = {name: p for name, p in trained_names(model).items() if "mov_vectors" in name}
    with torch.no_grad():
        for name, vector in vectors.items():
            twin = trained_names(ia3)[name.replace("mov_vectors", "ia3_l")]
            twin.copy_(vector.reshape(twin.shape))
    logits, gradients = loss_and_gradients(model)
    expected, wanted = loss_and_gradients(ia3)
    by_name = dict(zip(trained_names(model), gradients, strict=True))
    close([logits], [expected], atol=1e-12)
    close([by_name[name].flatten() for name in vectors], [gradient.flatten() for gradient in wanted], atol=1e-12)
    assert not any(gradient.any() for name, gradient in by_name.items() if "mov_router" in name)


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equal_vectors_make_the_router_irrelevant(family: str, router_input: str) -> None:
    model = adapted(network(family), num_experts=5, router_input=router_input)
    generator = torch.Generator().manual_seed(0)
    for layer in layers_of(model).values():
        vectors = layer.mov_vectors["default"].data
        vectors.copy_(1 + 0.3 * torch.randn(vectors.shape[1], generator=generator))
    before = model(input_ids=IDS).logits.detach()
    for layer in layers_of(model).values():
        router = layer.mov_router["default"].data
        router.copy_(torch.randn(router.shape, generator=generator))
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"hidden_size": 60, "num_heads": 6, "num_kv_heads": 3, "head_dim": 12, "mlp_size": 72}),
        ("qwen2", {"hidden_size": 48, "num_heads": 4, "num_kv_heads": 1, "head_dim": 12, "mlp_size": 56}),
        ("mistral", {}),
        ("gpt2", {"hidden_size": 40, "num_heads": 5, "num_kv_heads": 5, "head_dim": 8, "mlp_size": 88}),
    ],
)
def test_parameters(family: str, sizes: dict[str, int], router_input: str, n: int) -> None:
    """Vectors n (d_k + d_v + d_ff) L. Routers n 3 d L by site_input, n (d_k + d_v + d_ff) L by site_output.

    On GPT-2 the fused layer's 3 d stand for d_k + d_v, and there are two routers per block, not three.
    """
    layers, given = 3, shape(family, layers=3, **sizes)
    d, d_ff, d_key = given.hidden_size, given.mlp_size, given.num_kv_heads * given.head_dim
    model = adapted(network(family, layers=layers, **sizes), num_experts=n, router_input=router_input)
    widths, routers = ([3 * d, d_ff], 2) if family == "gpt2" else ([d_key, d_key, d_ff], 3)
    counts = {"mov_vectors": 0, "mov_router": 0}
    for name, parameter in trained_names(model).items():
        counts[name.split(".")[-2]] += parameter.numel()
    assert counts["mov_vectors"] == n * sum(widths) * layers
    assert counts["mov_router"] == n * (routers * d if router_input == "site_input" else sum(widths)) * layers


@pytest.mark.parametrize("router_input", INPUTS)
def test_the_routing_log_is_told_of_each_site(router_input: str) -> None:
    model = shaken(adapted(network("llama"), router_input=router_input), amount=1.0)
    seen: dict[str, Tensor] = {}
    for name, layer in layers_of(model).items():
        module = model.get_base_model().get_submodule(name.rpartition(".")[0]) if layer.is_feedforward else layer

        def keep(_module: nn.Module, args: Any, _output: Any, name: str = name) -> None:
            seen[name] = args[0]

        module.register_forward_hook(keep)
    quiet = model(input_ids=IDS).logits
    notes = listening(model)
    assert torch.equal(model(input_ids=IDS).logits, quiet)
    assert [name for name, _, _ in notes.rows] == sites(network("llama"))
    for name, probabilities, weights in notes.rows:
        assert probabilities.shape == weights.shape == (2, 12, 3)
        assert torch.equal(probabilities, weights)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 12), rtol=0, atol=1e-6)
        if router_input == "site_input":
            torch.testing.assert_close(weights, routing(layers_of(model)[name], seen[name]), rtol=0, atol=1e-5)
    assert notes.rows[0][1].std() > 0.01


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_computes_in_float32(autocast: bool) -> None:
    """bfloat16 keeps 8 bits: there, weights of a router that tells experts apart by 1e-4 would be equal."""
    model = adapted(network("llama", torch.bfloat16), num_experts=2, router_input="site_output")
    for layer in layers_of(model).values():
        router = layer.mov_router["default"].data
        router[1] = router[0] * (1 + 2**-12)
    notes = listening(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    for name, _, weights in notes.rows:
        assert weights.dtype == torch.float32, name
        assert (weights[..., 0] != weights[..., 1]).double().mean() > 0.5, name
    doubles = adapted(network("llama", FP64))
    notes = listening(doubles)
    doubles(input_ids=IDS)
    assert {weights.dtype for _, _, weights in notes.rows} == {FP64}


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("mode", ["every_layer", 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_nothing(family: str, mode: str | int, router_input: str) -> None:
    model = shaken(adapted(network(family), router_input=router_input), amount=0.5).train()
    one_token = IDS[:1, :1]
    plain, short = loss_and_gradients(model), loss_and_gradients(model, one_token)
    notes = listening(model)
    enable_checkpointing(model, mode)
    assert same(loss_and_gradients(model), plain)
    assert len(notes.rows) == 2 * len(layers_of(model))  # the second time for the backward pass
    assert same(loss_and_gradients(model, one_token), short)
    assert all(layer._mlp_input is None for layer in layers_of(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantized_bases(family: str, kind: str, router_input: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = quantized(family, kind, dtype, tmp_path)
    plain = base(input_ids=IDS).logits.detach()
    packed = {name: v.clone() for name, v in base.state_dict().items() if v.dtype in (torch.uint8, torch.int8)}
    model = adapted(copy.deepcopy(base), router_input=router_input)
    torch.testing.assert_close(model(input_ids=IDS).logits, plain, rtol=0, atol=1e-5 if kind == "nf4" else 2e-2)
    logits, gradients = loss_and_gradients(shaken(model, amount=0.3))
    assert logits.dtype == dtype
    hooked(base, model, router_input=router_input)
    expected = base(input_ids=IDS).logits
    wanted = torch.autograd.grad(expected.double().square().mean(), list(trained_names(model).values()))
    assert (logits - plain).abs().max() > 0.02
    close(
        [logits, *gradients],
        [expected.detach(), *wanted],
        atol=1e-4 if (dtype, kind) == (torch.float32, "nf4") else 0.1,
    )
    kept = {name.replace("base_layer.", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert packed and all(torch.equal(kept[name], value) for name, value in packed.items())


@pytest.mark.parametrize("router_input", INPUTS)
def test_several_adapters_multiply_and_go_again(router_input: str) -> None:
    base = network("llama", FP64)
    plain = base(input_ids=IDS).logits.detach()
    model = shaken(adapted(base, router_input=router_input), amount=0.5)
    alone = model(input_ids=IDS).logits.detach()
    swapped = next(kind for kind in INPUTS if kind != router_input)
    model.add_adapter("other", config(network("llama"), num_experts=2, router_input=swapped))
    assert torch.equal(model(input_ids=IDS).logits, alone)
    assert all(".default" in name for name in trained_names(model))
    model.set_adapter("other")
    assert all(".other" in name for name in trained_names(model))
    shaken(model, amount=0.5)
    model.base_model.set_adapter(["default", "other"])
    layer = layers_of(model)["model.layers.1.self_attn.v_proj"]
    x = torch.randn(2, 3, 64, dtype=FP64, generator=torch.Generator().manual_seed(0))
    v = layer.base_layer(x)
    reads = {"site_input": x, "site_output": v}
    both = mixed(layer, reads[router_input]) * mixed(layer, reads[swapped], "other")
    torch.testing.assert_close(layer(x), v * both, rtol=0, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.delete_adapter("other")
    assert not [name for name, _ in model.named_parameters() if "other" in name]
    torch.testing.assert_close(model(input_ids=IDS).logits, alone, rtol=0, atol=1e-12)
    assert torch.equal(model.unload()(input_ids=IDS).logits, plain)
    assert not [module for module in base.modules() if isinstance(module, MovLayer) or module._forward_pre_hooks]


def test_each_deep_copy_listens_to_its_own_mlp() -> None:
    model = shaken(adapted(network("llama")), amount=0.5)
    before = model(input_ids=IDS).logits.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=IDS).logits, before)
    shaken(twin, amount=0.5)
    changed = twin(input_ids=IDS).logits.detach()
    assert not torch.equal(changed, before)
    assert torch.equal(model(input_ids=IDS).logits, before)
    unloaded = twin.unload()
    assert not [module for module in unloaded.modules() if module._forward_pre_hooks]
    assert torch.equal(unloaded(input_ids=IDS).logits, network("llama")(input_ids=IDS).logits)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert all(layer._mlp_input is None for layer in layers_of(model).values())


def test_the_last_layer_alone_has_nothing_to_route_by() -> None:
    layer = layers_of(adapted(network("llama")))["model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj: its router reads the MLP's input"):
        layer(torch.zeros(1, 128))


def test_merging_is_refused_and_changes_nothing() -> None:
    model = shaken(adapted(network("llama"), num_experts=1))
    before = model(input_ids=IDS).logits.detach()
    for merge in (model.merge_and_unload, model.merge_adapter, next(iter(layers_of(model).values())).merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize(("family", "layers"), [("qwen2", 2), ("gpt2", 12), ("llama", 8)])
def test_saved_and_loaded(family: str, layers: int, router_input: str, tmp_path: Path) -> None:
    """24 names: beyond 20 PEFT saves ends of names as target_modules, but leaves feedforward_modules as they are."""
    model = shaken(adapted(network(family, layers=layers), router_input=router_input))
    logits = model(input_ids=IDS).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(family, layers=layers), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    assert not trained_names(loaded)
    again = PeftModel.from_pretrained(network(family, layers=layers), tmp_path, is_trainable=True)
    assert trained_names(again).keys() == trained_names(model).keys()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["num_experts"], written["router_input"]) == ("MOV", 3, router_input)


@pytest.mark.slow
def test_a_fresh_process_that_imports_the_lab_gives_the_same_logits(tmp_path: Path) -> None:
    model = shaken(adapted(network("qwen2")))
    logits = model(input_ids=IDS).logits.detach()
    assert torch.equal(fresh_logits(network("qwen2"), model, tmp_path), logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an integer >= 1, got 0"),
        ({"num_experts": 2.5}, "num_experts: expected an integer >= 1, got 2.5"),
        ({"feedforward_modules": "down_.*"}, 'expected a list of names, got "down_'),
        ({"router_input": "site_inputs"}, 'did you mean "site_input"'),
        ({"feedforward_modules": ["up_proj"]}, '"up_proj" is not among the target modules'),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovConfig(**{"num_experts": 2, "target_modules": ["k_proj", "down_proj"], **settings})


def test_modules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="embed_tokens: MoV needs a linear layer, got Embedding"):
        get_peft_model(network("llama"), MovConfig(num_experts=2, target_modules=["embed_tokens"]))
    model = get_peft_model(network("llama"), MovConfig(num_experts=2, target_modules=["down_proj"]))
    other = MovConfig(num_experts=2, target_modules=["down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="feedforward in one adapter of the model and not in another"):
        model.add_adapter("other", other)
