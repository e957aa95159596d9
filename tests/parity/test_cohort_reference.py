"""Members of a cohort get the gradients that PEFT gives them: in one mixed batch of its own, and each by itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.data.encode import Encoded
from lora_lab.models.shared_copy import shared_copy
from lora_lab.train.checkpointing import enable_checkpointing
from lora_lab.train.forward import token_losses
from tests.peft_mixed import Adapter, Gradients, apart, reference_gradients, separate_gradients
from tests.tuner_bases import network, quantized, shaken, trained_names

pytestmark = pytest.mark.usefixtures("one_core")

# Relative to the largest element of each gradient.
_ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_BASES = ["llama", "tied llama", "qwen2", "gpt2", "nf4 llama", "nf4 gpt2"]


def base_of(kind: str, dtype: torch.dtype, folder: Path) -> Any:
    """A frozen base by its name; 4-bit ones compute in fp32."""
    family = kind.split()[-1]
    if kind.startswith("nf4"):
        base = quantized(family, "nf4", dtype, folder).requires_grad_(False)
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # GPT-2 has some of its own
        return base
    wide = {"hidden_size": 128, "head_dim": 32} if kind == "llama" else {}
    return network(family, dtype, tied_embeddings=kind.startswith("tied"), **wide).requires_grad_(False)


def configs_of(kind: str) -> dict[str, LoraConfig]:
    """Four adapters of which no two have the same rank, scaling or targets; head and embedding where they are whole."""
    if kind.endswith("gpt2"):
        targets = [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["c_fc"], ["c_proj"]]
    else:
        targets = [["q_proj", "v_proj"], _LINEAR, ["down_proj"], ["k_proj", "o_proj", "up_proj"]]
    if kind in ("llama", "qwen2"):
        targets[2] = [*targets[2], "lm_head"]
        targets[3] = [*targets[3], "embed_tokens"]
    ranks = [1, 128 if kind == "llama" else 64, 3, 16]
    settings = [{}, {"use_rslora": True}, {"lora_alpha": 1}, {"layers_to_transform": [1]}]
    if kind in ("llama", "qwen2"):
        settings[3] = {}  # the embedding is in no layer
    return {
        name: LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM", **{"lora_alpha": rank, **more})
        for name, rank, modules, more in zip(("one", "wide", "odd", "deep"), ranks, targets, settings, strict=True)
    }


def rows_of(names: Sequence[str]) -> dict[str, list[Encoded]]:
    """One to four rows each, of 2 to 23 tokens; loss on the end of each, on one token at least."""
    draw = random.Random(5)
    found: dict[str, list[Encoded]] = {}
    for count, name in enumerate(names, start=1):
        found[name] = []
        for _ in range(count):
            length = draw.randint(2, 23)
            first = draw.randint(1, length - 1)
            ids = tuple(draw.randrange(256) for _ in range(length))
            found[name].append(Encoded(ids, tuple(place >= first for place in range(length)), cut=False))
    return found


def members_of(base: Any, configs: Mapping[str, LoraConfig]) -> dict[str, PeftModel]:
    """An adapter on a copy of the base each, moved away from its beginning, where B is zero and A has no gradient."""
    members = {}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        members[name] = shaken(get_peft_model(shared_copy(base), config), 0.02)
    return members


def cohort_gradients(
    base: Any, members: Mapping[str, PeftModel], batches: Mapping[str, Sequence[Encoded]], *, mode: str | int = "off"
) -> Gradients:
    """Gradients of the members, by name, from one pass of theirs; they are left as they were."""
    trunk = Trunk(base)
    enable_checkpointing(trunk.model, mode)
    for name, model in members.items():
        trunk.join(name, model)
    return pass_gradients(trunk, members, batches)


def pass_gradients(
    trunk: Trunk, members: Mapping[str, PeftModel], batches: Mapping[str, Sequence[Encoded]]
) -> Gradients:
    """The same from a trunk on which the members are seated."""
    logits, made = trunk({name: batches[name] for name in members})
    losses = token_losses(logits, made.targets)
    torch.autograd.backward([losses[span.start : span.stop].mean() for span in made.outputs.values()])
    found = {}
    for name, model in members.items():
        parameters = trained_names(model)
        assert all(parameter.grad is not None for parameter in parameters.values()), name
        found[name] = {key.replace(".default", ""): one.grad.clone() for key, one in parameters.items()}
        model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", _BASES)
def test_the_reference_equals_separate_runs_of_peft(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    dtype = torch.float32 if kind.startswith("nf4") else torch.float64
    base, batches = base_of(kind, dtype, tmp_path), rows_of(list(configs_of(kind)))
    adapters = {name: Adapter.of(model) for name, model in members_of(base, configs_of(kind)).items()}
    mixed = reference_gradients(base, adapters, batches, checkpointing=checkpointing)
    assert apart(mixed, separate_gradients(base, adapters, batches, checkpointing=checkpointing)) < _ALLOWED[dtype]


@pytest.mark.parametrize("mode", ["off", "every_layer", 2])
@pytest.mark.parametrize("kind", _BASES)
def test_a_pass_of_the_cohort_gives_the_references_gradients(kind: str, mode: str | int, tmp_path: Path) -> None:
    for dtype in [torch.float32] if kind.startswith("nf4") else [torch.float64, torch.float32]:
        base, batches = base_of(kind, dtype, tmp_path), rows_of(list(configs_of(kind)))
        members = members_of(base, configs_of(kind))
        reference = reference_gradients(base, {name: Adapter.of(one) for name, one in members.items()}, batches)
        assert apart(cohort_gradients(base, members, batches, mode=mode), reference) < _ALLOWED[dtype]


def test_a_bf16_base_is_as_exact_as_in_peft() -> None:
    """Adapters in fp32 on a bf16 base: all gradients of a member are as far, by their root mean square, from those of
    the same weights in fp64 as PEFT's are."""
    base = network("llama", torch.bfloat16).requires_grad_(False)
    configs, batches = configs_of("tied llama"), rows_of(list(configs_of("tied llama")))
    members = members_of(base, configs)
    adapters = {name: Adapter.of(model) for name, model in members.items()}
    assert {one.dtype for adapter in adapters.values() for one in adapter.weights.values()} == {torch.float32}
    doubled = {
        name: Adapter(one.config, {key: weight.double() for key, weight in one.weights.items()})
        for name, one in adapters.items()
    }
    exact = reference_gradients(copy.deepcopy(base).double(), doubled, batches)
    ours, theirs = cohort_gradients(base, members, batches), separate_gradients(base, adapters, batches)
    for name in configs:
        assert _error(ours[name], exact[name]) <= 1.25 * _error(theirs[name], exact[name]), name


def _error(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    off = sum(float((found[key].double() - one).square().sum()) for key, one in exact.items())
    return float((off / sum(float(one.square().sum()) for one in exact.values())) ** 0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "nf4 llama"])
def test_nan_in_one_member_reaches_no_other(kind: str, tmp_path: Path) -> None:
    """The others' gradients are the same to the last bit as beside a sound one, whether weights or rows are broken."""
    base, batches = base_of(kind, torch.float32, tmp_path), rows_of(list(configs_of(kind)))
    members = members_of(base, configs_of(kind))
    sound = cohort_gradients(base, members, batches)
    for parameter in trained_names(members["wide"]).values():
        parameter.data.flatten()[0] = float("nan")
    broken = cohort_gradients(base, members, batches)
    assert any(one.isnan().any() for one in broken["wide"].values())
    for name in ("one", "odd", "deep"):
        assert all(torch.equal(broken[name][key], one) for key, one in sound[name].items()), name


def test_who_comes_and_goes_leaves_the_others_gradients(tmp_path: Path) -> None:
    """One trunk over several passes: members in any company and order, and a member that comes back."""
    base, batches = base_of("llama", torch.float64, tmp_path), rows_of(list(configs_of("llama")))
    members = members_of(base, configs_of("llama"))
    expected = separate_gradients(base, {name: Adapter.of(one) for name, one in members.items()}, batches)
    trunk = Trunk(base)
    for company in (["one"], ["deep", "one", "wide"], ["wide", "odd"], ["odd", "wide", "deep", "one"]):
        for name in set(trunk.members) - set(company):
            trunk.leave(name)
        for name in company:
            if name not in trunk.members:
                trunk.join(name, members[name])
        found = pass_gradients(trunk, {name: members[name] for name in company}, batches)
        assert apart(found, {name: expected[name] for name in company}) < 1e-12, company


def test_the_reference_fails_where_its_hooks_are_gone(tmp_path: Path) -> None:
    """What the reference guards against: checkpointed layers computed again without the names of the adapters."""
    base, configs = base_of("llama", torch.float64, tmp_path), configs_of("llama")
    adapters = {name: Adapter.of(model) for name, model in members_of(base, configs).items()}
    batches = rows_of(list(configs))
    late = reference_gradients(base, adapters, batches, checkpointing=True, reentrant=True, backward_within=False)
    assert apart(late, separate_gradients(base, adapters, batches)) > 1e-3
