"""Parameter counts that papers, model cards and repositories state, from the ready model files alone.

Sources of the LoRA rows: lit-gpt's and Raschka's LoRA tables for Llama-2, PEFT's method comparison for Llama-3.2-3B;
the SmolLM2 rows are its known total and the closed formula of Hu et al. (2021).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lab.errors import InputError
from lora_lab.plan.counts import adapter_parameters, total_parameters, trainable_parameters
from lora_lab.plan.quantized import quantized_bytes
from lora_lab.schema.adaptation import PARTS
from lora_lab.schema.trial import Trial, read_trial
from tests.unit.test_plan_trials import trial_of

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "conf" / "model"
FINDINGS = ROOT.parent / "shared" / "findings" / "analytic_checks.yaml"

BASE_TOTALS = {
    "smollm2_135m": 134_515_008,
    "gpt2": 124_439_808,
    "qwen2_0_5b": 494_032_768,
    "qwen2_5_3b": 3_085_938_688,
    "tinyllama_1b": 1_100_048_384,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "mistral_7b": 7_241_732_096,
}
QV = ("query", "value")
ALL = ("query", "key", "value", "projection", "mlp")
ALL_HEAD = (*ALL, "head")
LORA_ROWS = [
    ("llama2_7b", QV, 8, 4_194_304),
    ("llama2_7b", ALL_HEAD, 8, 20_277_248),
    ("llama2_7b", ALL, 8, 19_988_480),
    ("llama2_7b", ALL_HEAD, 16, 40_554_496),
    ("llama2_7b", ALL_HEAD, 256, 648_871_936),
    ("llama2_13b", QV, 8, 6_553_600),
    ("llama3_3b", QV, 32, 9_175_040),
    ("llama3_3b", QV, 64, 18_350_080),
    ("llama3_3b", ("mlp",), 10, 9_461_760),
    *[("smollm2_135m", QV, rank, 57_600 * rank) for rank in (1, 4, 8, 16, 32, 64, 128, 256)],
    *[("smollm2_135m", ALL, rank, 305_280 * rank) for rank in (1, 4, 8, 16, 32, 64, 128, 256)],
    ("smollm2_135m", ALL_HEAD, 8, 2_840_064),
    ("smollm2_135m", ALL_HEAD, 256, 90_882_048),
]


def leaf(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    return loaded


def method_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, **({} if kind in ("base", "full") else {"rank_factors": []})}


def trial(
    model: str, *, method: str = "lora", parts: tuple[str, ...] = QV, rank: int = 8, **model_values: Any
) -> Trial:
    return trial_of(model={**leaf(model), **model_values}, method=method_of(method), parts=parts, rank=rank)


@pytest.mark.parametrize(("name", "published"), BASE_TOTALS.items())
def test_base_total(name: str, published: int) -> None:
    assert total_parameters(trial(name, method="base")) == published
    assert trainable_parameters(trial(name, method="base")) == 0
    assert trainable_parameters(trial(name, method="full")) == published


def test_every_ready_model_is_checked() -> None:
    """A new file in conf/model needs its published total above; these three have none."""
    assert {file.stem for file in MODELS.glob("*.yaml")} == BASE_TOTALS.keys() | {"tiny_random", "hub", "folder"}


@pytest.mark.parametrize(("name", "parts", "rank", "published"), LORA_ROWS)
def test_lora_rows(name: str, parts: tuple[str, ...], rank: int, published: int) -> None:
    untied = False if "head" in parts and leaf(name)["shape"]["tied_embeddings"] else None
    row = trial(name, parts=parts, rank=rank, tie_embeddings=untied)
    copied = 0 if untied is None else leaf(name)["shape"]["vocab_size"] * leaf(name)["shape"]["hidden_size"]
    assert adapter_parameters(row) == trainable_parameters(row) == published
    assert total_parameters(row) == BASE_TOTALS[name] + copied + published


def test_rslora_is_as_large_as_lora() -> None:
    assert adapter_parameters(trial("llama2_7b", method="rslora")) == 4_194_304


def test_dora_adds_its_magnitudes() -> None:
    """PEFT's method comparison: DoRA on q,v of Llama-3.2-3B at rank 32 has 114,688 parameters more than LoRA."""
    assert adapter_parameters(trial("llama3_3b", method="dora", rank=32)) == 9_175_040 + 114_688


def test_head_of_a_tied_model_by_name_is_refused() -> None:
    values = trial("smollm2_135m").model_dump(mode="json")
    values["target"] = {**dict.fromkeys(PARTS, False), "modules": ["lm_head"]}
    with pytest.raises(InputError, match="tie_embeddings=false makes a copy"):
        adapter_parameters(read_trial(values))


def test_unknown_shape_has_no_counts() -> None:
    unknown = trial("llama2_7b", shape=None)
    assert (adapter_parameters(unknown), trainable_parameters(unknown), total_parameters(unknown)) == (None, None, None)


def test_quantized_llama_2_7b() -> None:
    """6,476,005,376 weights can be quantized; with the others in bf16: 4.168 GB as NF4, 3.866 GB double quantized."""
    shape = trial("llama2_7b").model.shape
    assert shape is not None
    plain = quantized_bytes(shape, double_quantization=False)
    double = quantized_bytes(shape, double_quantization=True)
    assert plain.parameters == 6_476_005_376
    assert plain.bits_per_parameter == 4.5
    assert double.bits_per_parameter == pytest.approx(4.127, abs=5e-4)
    rest_bytes = 2 * (BASE_TOTALS["llama2_7b"] - plain.parameters)
    assert (plain.packed_bytes + plain.constant_bytes + rest_bytes) / 1e9 == pytest.approx(4.168, abs=5e-4)
    assert (double.packed_bytes + double.constant_bytes + rest_bytes) / 1e9 == pytest.approx(3.866, abs=1e-3)


def test_quantizable_weights_of_the_embedded_model() -> None:
    shape = trial("smollm2_135m").model.shape
    assert shape is not None
    assert quantized_bytes(shape, double_quantization=True).parameters == 106_168_320


def test_rows_above_are_those_of_the_findings() -> None:
    """The numbers are copied here so that no other folder is needed; where their source is present, they must agree."""
    if not FINDINGS.is_file():
        pytest.skip(f"no research notes at {FINDINGS}")
    entries = {entry["id"]: entry for entry in yaml.safe_load(FINDINGS.read_text())["entries"]}
    rows = entries["analytic-lora-params"]["published"]["rows"]
    here = {published for _, _, _, published in LORA_ROWS} | set(BASE_TOTALS.values()) | {114_688}
    later = ("IA3", "prefix", "prompt", "LISA")  # methods that are not in the lab yet
    missing = [row for row in rows if row[4] not in here and not row[1].startswith(later)]
    assert missing == []
    smol = entries["analytic-smol135"]["published"]
    for name in ("lora q,v", "lora all 7 linear", "lora all + head"):
        assert set(smol[name].values()) <= here
