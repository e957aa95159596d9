"""What the plan counts for each method: published numbers, closed forms, and attached models of random sizes.

Published: the parameter tables of MoLA's and LoRAMoE's shapes, PEFT's method comparison (Llama-3.2-3B), LISA's script.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.app.compose import Composer
from lora_lab.app.locations import conf_folder
from lora_lab.errors import InputError
from lora_lab.models.random import byte_tokenizer, random_network
from lora_lab.plan.counts import Counts, counts_of
from lora_lab.plan.layer_groups import layer_of, per_layer
from lora_lab.plan.steps import steps_of
from lora_lab.schema.method import METHODS
from lora_lab.schema.trial import LAB_KEYS, Trial, read_trial
from tests.conftest import MakeTrial

pytestmark = pytest.mark.usefixtures("one_core")

FINDINGS = Path(__file__).parents[3] / "shared" / "findings" / "analytic_checks.yaml"
LLAMA_2_7B = ("model=llama2_7b",)
LLAMA_3_3B = ("model=llama3_3b",)
SMOL = ("model=smollm2_135m",)


def counted(trial: Trial) -> Counts:
    found = counts_of(trial)
    assert found is not None
    return found


# (overrides, adapter parameters, router parameters)
PUBLISHED: list[tuple[tuple[str, ...], int, int]] = [
    *[
        ((*LLAMA_2_7B, "method=mola", "target=all_linear", "rank=8", f"method.experts={shape}"), 99_942_400, 5_693_440)
        for shape in ("[2,4,6,8]", "[8,6,4,2]", "[8,2,2,8]", "[5,5,5,5]", "[5]")
    ],
    *[
        ((*LLAMA_2_7B, "method=mola", "target=all_linear", "rank=8", f"method.experts={shape}"), 159_907_840, 9_109_504)
        for shape in ("[8,8,8,8]", "[8]")
    ],
    ((*LLAMA_2_7B, "method=lora", "target=all_linear", "rank=64"), 159_907_840, 0),
    ((*LLAMA_2_7B, "method=molora", "target=all_linear", "rank=8", "method.experts=5"), 99_942_400, 5_693_440),
    ((*LLAMA_2_7B, "method=loramoe", "rank=4", "method.experts=6"), 34_799_616, 3_686_400),
    ((*LLAMA_2_7B, "method=loramoe", "rank=4", "method.experts=8"), 46_399_488, 4_915_200),
    ((*LLAMA_3_3B, "method=ia3"), 286_720, 0),
    ((*LLAMA_3_3B, "method=prompt_tuning", "method.virtual_tokens=200"), 614_400, 0),
    ((*LLAMA_3_3B, "method=prefix_tuning", "method.virtual_tokens=200"), 11_468_800, 0),
    ((*LLAMA_3_3B, "method=prefix_tuning", "method.virtual_tokens=50"), 2_867_200, 0),
    (("setup=p_tuning",), 28_382_208, 0),
    ((*LLAMA_3_3B, "method=dora", "target=qv", "rank=32"), 9_175_040 + 114_688, 0),
    *[((*SMOL, "method=lora", "target=qv", f"rank={rank}"), 57_600 * rank, 0) for rank in (1, 8, 64, 256)],
    *[((*SMOL, "method=lora", "target=all_linear", f"rank={rank}"), 305_280 * rank, 0) for rank in (1, 8, 64, 256)],
    *[
        ((*SMOL, "method=lora", "target=all_linear_head", "model.tie_embeddings=false", f"rank={rank}"), size, 0)
        for rank, size in ((8, 2_840_064), (256, 90_882_048))
    ],
]


@pytest.mark.parametrize(("overrides", "adapter", "router"), PUBLISHED, ids=lambda one: str(one))
def test_published(make_trial: MakeTrial, overrides: tuple[str, ...], adapter: int, router: int) -> None:
    lines = overrides if overrides[0].startswith("model") else (*overrides, "model=llama3_3b")
    found = counted(make_trial(*lines))
    assert (found.adapter_parameters, found.router_parameters) == (adapter, router)
    assert found.trainable_parameters == adapter + router


LISA = [
    ("llama3_8b", 2, 1_486_901_248),
    ("llama2_7b", 2, 666_914_816),
    ("smollm2_135m", 0, 28_312_128),
    ("smollm2_135m", 2, 35_392_320),
    ("smollm2_135m", 4, 42_472_512),
    ("smollm2_135m", 8, 56_632_896),
    ("smollm2_135m", 30, 134_515_008),
]


@pytest.mark.parametrize(("model", "layers", "published"), LISA)
def test_lisa(make_trial: MakeTrial, model: str, layers: int, published: int) -> None:
    found = counted(make_trial(f"model={model}", "method=lisa", f"method.layers={layers}"))
    assert (found.adapter_parameters, found.trainable_parameters) == (0, published)


def test_lisa_of_more_layers_than_there_are_is_refused(make_trial: MakeTrial) -> None:
    with pytest.raises(InputError, match=r"method.layers.*30"):
        counts_of(make_trial(*SMOL, "method=lisa", "method.layers=31"))


@pytest.mark.parametrize("router_input", ["site_input", "site_output"])
@pytest.mark.parametrize("experts", [1, 10])
def test_mov(make_trial: MakeTrial, router_input: str, experts: int) -> None:
    """Vectors n (d_k + d_v + d_ff) L; routers n 3 d L, or as many as vectors. Llama-3.2-3B: 28 layers, d 3072, key and
    value 1024 wide, d_ff 8192."""
    found = counted(
        make_trial(*LLAMA_3_3B, "method=mov", f"method.experts={experts}", f"method.router_input={router_input}")
    )
    widths = 1024 + 1024 + 8192
    assert found.adapter_parameters == experts * 286_720 == experts * widths * 28
    assert found.router_parameters == experts * 28 * (3 * 3072 if router_input == "site_input" else widths)


def test_other_closed_forms(make_trial: MakeTrial) -> None:
    """Llama-2-7B, d = 4096, 32 layers."""

    def size(*overrides: str) -> int:
        return counted(make_trial(*LLAMA_2_7B, *overrides)).adapter_parameters

    d, layers, m = 4096, 32, 256
    block = 2 * d * m + m + d
    assert size("method=bottleneck", "method.style=houlsby") == 2 * layers * block
    assert size("method=bottleneck", "method.style=pfeiffer") == layers * block
    assert size("method=bottleneck", "method.style=parallel", "method.reduction_factor=8") == layers * (
        2 * d * 512 + 512 + d
    )
    assert size("method=prefix_tuning", "method.virtual_tokens=30") == 30 * 2 * layers * d
    projected = ("method.projection=true", "method.encoder_hidden_size=100")
    mlp = (d * 100 + 100) + (100 * 2 * layers * d + 2 * layers * d)
    assert size("method=prefix_tuning", "method.virtual_tokens=30", *projected) == 30 * d + mlp
    assert size("method=adalora", "target=qv", "method.initial_rank=12") == 2 * layers * 12 * (2 * d + 1)
    assert size("method=lora", "target=qv", "rank=8", "method.rank_factors=[0.5,0.5,1,2]") == 4_194_304
    assert size("method=lora", "target=qv", "rank=8", "method.rank_factors=[1,3]") == 2 * 4_194_304
    pissa = counted(make_trial(*LLAMA_2_7B, "method=pissa", "target=qv", "rank=8"))
    assert (pissa.adapter_parameters, pissa.trainable_parameters) == (4_194_304, 4_194_304)
    assert pissa.total_parameters == 6_738_415_616 + 2 * 4_194_304, "its frozen start is as large"


def test_rows_above_are_those_of_the_findings() -> None:
    """The numbers are copied here so that no other folder is needed; where their source is present, they must agree."""
    if not FINDINGS.is_file():
        pytest.skip(f"no research notes at {FINDINGS}")
    entries = {entry["id"]: entry["published"] for entry in yaml.safe_load(FINDINGS.read_text())["entries"]}
    mola, smol = entries["analytic-mola"], entries["analytic-smol135"]
    here = {(adapter, router) for _, adapter, router in PUBLISHED}
    assert (mola["20-expert shapes"], mola["routers (7 per layer)"]["20-expert"]) in here
    assert (mola["8-8-8-8"], mola["routers (7 per layer)"]["8-8-8-8"]) in here
    assert {tuple(one) for one in mola["LoRAMoE r=4 FFN"].values()} <= here
    lisa = {layers: size for model, layers, size in LISA if model == "smollm2_135m"}
    assert all(lisa[int(key.removeprefix("gamma"))] == size for key, (size, _) in smol["LISA trainable"].items())
    sizes = {size for _, size, _ in PUBLISHED} | {size for *_, size in LISA}
    later = ("IA3", "prefix", "prompt", "LISA")
    rows = [row[4] for row in entries["analytic-lora-params"]["rows"] if row[1].startswith(later)]
    assert len(rows) == 4 and set(rows) <= sizes


# Setups

# Of each setup: adapter and router parameters where they are published or a closed form gives them; None: the chosen
# model decides. dora: q, k, v 8192 wide, up and down 15104, rank 32, 32 layers, and one magnitude per output.
SETUPS: dict[str, tuple[int, int] | None] = {
    "adalora": None,
    "bottleneck": (2 * 32 * (2 * 4096 * 256 + 256 + 4096), 0),
    "dora": (32 * (32 * (3 * 8192 + 2 * 15104) + 3 * 4096 + 11008 + 4096), 0),
    "galore": (0, 0),
    "ia3": (286_720, 0),
    "lisa": (0, 0),
    "lora_plus": None,
    "loramoe": (34_799_616, 3_686_400),
    "mola": (99_942_400, 5_693_440),
    "molora": None,
    "mov": None,
    "none": None,
    "p_tuning": (28_382_208, 0),
    "pissa": (335_544_320, 0),
    "prefix_tuning": (11_468_800, 0),
    "prompt_tuning": (614_400, 0),
    "raschka_lora": (4_194_304, 0),
    "rslora": (18_350_080, 0),
    "sophia": (0, 0),
}


def test_every_setup_is_below() -> None:
    """A new file in conf/setup needs its row."""
    assert {file.stem for file in (conf_folder() / "setup").glob("*.yaml")} == set(SETUPS)


@pytest.mark.parametrize("setup", SETUPS)
def test_setup_composes_and_plans(composer: Composer, setup: str) -> None:
    """With data of 52,002 rows (Alpaca's)."""
    mapping = composer.compose([f"setup={setup}"]).mapping
    trial = read_trial({key: value for key, value in mapping.items() if key not in LAB_KEYS})
    found, steps = counted(trial), steps_of(trial, 52_002)
    assert steps is not None and steps.steps >= 1
    expected = SETUPS[setup]
    if expected is not None:
        assert (found.adapter_parameters, found.router_parameters) == expected
    if setup not in ("none", "raschka_lora", "sophia"):
        assert trial.method.kind == setup


def test_dora_of_the_published_setup_has_the_published_share(composer: Composer) -> None:
    """0.84 % of LLaMA-7B (Liu et al. 2024, table 1), LoRA of the same rank and targets 0.83 %."""
    adapter, _ = SETUPS["dora"] or (0, 0)
    base = 6_738_415_616
    assert round(100 * adapter / (base + adapter), 2) == 0.84
    lora = adapter - 32 * (3 * 4096 + 11008 + 4096)
    assert round(100 * lora / (base + lora), 2) == 0.83


# Lists over layers


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.data())
def test_groups_of_layers(layers: int, data: st.DataObject) -> None:
    """As many groups as values, lowest first, none empty, sizes that differ by one at most."""
    values = data.draw(st.integers(1, layers))
    found = per_layer(range(values), layers, where="x")
    assert len(found) == layers and list(found) == sorted(found) and set(found) == set(range(values))
    sizes = [found.count(value) for value in range(values)]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(InputError, match=f"x: {layers + 1} entries for a model of {layers} layers"):
        per_layer(range(layers + 1), layers, where="x")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj", 3),
        ("transformer.h.11.attn.c_attn", 11),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", 0),
        ("h.2", 2),
        ("model.embed_tokens", None),
        ("lm_head", None),
        ("transformer.ln_f", None),
        ("model.sublayers.3.x", None),
        ("model.layers.x", None),
    ],
)
def test_layer_of(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


# Attached models of random sizes


def of_layers(draw: st.DrawFn, layers: int, least: int, most: int) -> str:
    return str(draw(st.lists(st.integers(least, most), min_size=1, max_size=layers))).replace(" ", "")


def own_settings(draw: st.DrawFn, method: str, layers: int, rank: int, width: int) -> list[str]:
    """Settings of the method that decide its size, at random."""
    some = st.integers(1, 5)
    table: dict[str, Callable[[], list[str]]] = {
        "lora": lambda: [f"method.rank_factors={of_layers(draw, layers, 1, width // rank)}"],
        "pissa": lambda: [f"method.rank_factors={of_layers(draw, layers, 1, width // rank)}"],
        "adalora": lambda: [f"method.initial_rank={rank + draw(st.integers(0, width - rank))}"],
        "prompt_tuning": lambda: [f"method.virtual_tokens={draw(some)}"],
        "p_tuning": lambda: [
            f"method.virtual_tokens={draw(some)}",
            f"method.encoder={draw(st.sampled_from(['mlp', 'lstm']))}",
            f"method.encoder_hidden_size={draw(some)}",
            f"method.encoder_layers={draw(st.integers(1, 3))}",
        ],
        "prefix_tuning": lambda: [
            f"method.virtual_tokens={draw(some)}",
            f"method.projection={str(draw(st.booleans())).lower()}",
            f"method.encoder_hidden_size={draw(some)}",
        ],
        "bottleneck": lambda: [
            f"method.style={draw(st.sampled_from(['houlsby', 'pfeiffer', 'parallel']))}",
            f"method.reduction_factor={draw(some)}",
        ],
        "mov": lambda: [
            f"method.experts={draw(some)}",
            f"method.router_input={draw(st.sampled_from(['site_input', 'site_output']))}",
        ],
        "molora": lambda: [f"method.experts={draw(some)}"],
        "loramoe": lambda: [f"method.experts={2 * draw(some)}"],
        "mola": lambda: [f"method.experts={of_layers(draw, layers, 2, 5)}"],
        "freeze": lambda: [f"method.last_layers={draw(st.integers(1, layers))}", "method.modules=[lm_head]"],
        "lisa": lambda: [f"method.layers={draw(st.integers(0, layers))}"],
    }
    own = {"rslora": "lora", "dora": "lora", "lora_plus": "lora", "olora": "pissa"}.get(method, method)
    return table.get(own, list)()


@st.composite
def sizes(draw: st.DrawFn, method: str) -> list[str]:
    """A shape, a target and settings: widths that are no powers of two, fewer key and value heads than queries."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "gpt2"]))
    groups, kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(2, 5))
    heads = kv_heads if family == "gpt2" else kv_heads * groups
    layers = draw(st.integers(1, 5))
    shape = {
        "family": family,
        "hidden_size": heads * head_dim,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_size": draw(st.integers(5, 40)),
        "vocab_size": draw(st.integers(260, 300)),
        "max_positions": 16,
        "tied_embeddings": str(draw(st.booleans())).lower(),
    }
    width = min(kv_heads * head_dim, int(str(shape["mlp_size"])))
    rank = draw(st.integers(1, width))
    targets = ["attention", "all_linear", "mlp"] + (
        [] if family == "gpt2" else ["qv", "[key,projection]", "[q_proj,down_proj]"]
    )
    if method in ("ia3", "mov"):
        targets = ["ia3"] if family == "gpt2" else ["ia3", "[value]", "[key,mlp]"]
    target = "mlp" if method == "loramoe" else draw(st.sampled_from(targets))
    return [
        f"method={method}",
        *(f"model.shape.{key}={value}" for key, value in shape.items()),
        f"target={target}",
        f"rank={rank}",
        *own_settings(draw, method, layers, rank, width),
    ]


@pytest.mark.parametrize("method", [kind for kind in METHODS if kind != "base"])
def test_the_plan_counts_what_is_attached(make_trial: MakeTrial, method: str) -> None:
    tokenizer = byte_tokenizer(16)

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(sizes(method))
    def check(overrides: list[str]) -> None:
        trial = make_trial(*overrides)
        planned = counted(trial)
        assert trial.model.shape is not None
        model = random_network(trial.model.shape, 0)
        attached = attach(model, trial, tokenizer=tokenizer, steps=20).model
        found = count_parameters(attached)
        assert (found.trainable, found.total) == (planned.trainable_parameters, planned.total_parameters)
        routers = sum(one.numel() for key, one in attached.named_parameters() if "router" in key)
        assert routers == planned.router_parameters

    check()
