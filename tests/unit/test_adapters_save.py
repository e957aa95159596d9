"""Adapter folders: whole or absent, and nothing broken or hostile comes in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_lab.adapters.attach import attach
from lora_lab.adapters.save import load_adapter, save_adapter, save_model
from lora_lab.errors import InputError, MachineError
from lora_lab.models.load import load_base
from lora_lab.models.random import byte_tokenizer, random_network
from tests.conftest import MakeTrial
from tests.unit.test_adapters_attach import load
from tests.unit.test_models_random import tiny_shape

IDS = torch.arange(12).reshape(1, 12)


def shaken(model: Any) -> Any:
    """Trained, for the purposes of a test: every adapter weight has moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def saved(make_trial: MakeTrial, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trial = make_trial("target=all_linear", "rank=4")
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(shaken(attach(load(trial, cache), trial).model), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora", "target=qv", "dropout=0.1"],
        ["method=rslora", "target=[all_linear_head,embedding]"],
        ["method=dora", "target=[all_linear_head,embedding]"],
        ["method=dora", "target=all_linear", "quantization=nf4", "training.precision=bf16"],
        ["method=lora", "target=all_linear_head", "quantization=fp4"],
    ],
)
def test_plain_peft_and_ours_give_the_same_logits_back(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, overrides: list[str]
) -> None:
    trial = make_trial(*overrides)
    model = shaken(attach(load(trial, cache), trial).model)
    size_bytes = save_adapter(model, tmp_path / "adapter")
    logits = model(input_ids=IDS).logits
    plain = PeftModel.from_pretrained(load(trial, cache), tmp_path / "adapter").eval()
    ours = load_adapter(load(trial, cache), tmp_path / "adapter")
    assert torch.equal(plain(input_ids=IDS).logits, logits)
    assert torch.equal(ours(input_ids=IDS).logits, logits)
    assert not torch.equal(load(trial, cache).eval()(input_ids=IDS).logits, logits)
    assert size_bytes == sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["lora_dropout"]) == ("CAUSAL_LM", trial.dropout)
    assert config["base_model_name_or_path"]
    assert config["target_modules"] == sorted(config["target_modules"])  # the same bytes every time
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)  # no copy of embedding or head


def test_a_named_adapter_is_saved_alone(make_trial: MakeTrial, cache: Path, tmp_path: Path) -> None:
    trial = make_trial("rank=2")
    model = attach(load(trial, cache), trial, name="first").model
    model = attach(model, trial, name="second").model
    save_adapter(model, tmp_path / "out", name="second")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    load_adapter(load(trial, cache), tmp_path / "out")


def test_full_saves_the_whole_model(make_trial: MakeTrial, cache: Path, tmp_path: Path) -> None:
    trial = make_trial("method=full")
    model = shaken(attach(load(trial, cache), trial).model)
    save_adapter(model, tmp_path / "full")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_saved_model_is_a_model_folder(make_trial: MakeTrial, cache: Path, tmp_path: Path) -> None:
    model = random_network(tiny_shape("gpt2", tied=True), 0)
    save_model(model, byte_tokenizer(64), tmp_path / "m")
    trial = make_trial("model=folder", f"model.path={tmp_path / 'm'}")
    again = load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=cache)
    assert torch.equal(again.model.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_what_is_there_is_not_overwritten(make_trial: MakeTrial, cache: Path, folder: Path) -> None:
    trial = make_trial()
    with pytest.raises(InputError, match="exists"):
        save_adapter(attach(load(trial, cache), trial).model, folder)


def test_nan_is_not_saved(make_trial: MakeTrial, cache: Path, tmp_path: Path) -> None:
    trial = make_trial()
    model = attach(load(trial, cache), trial).model
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad)[0] = float("nan")
    with pytest.raises(InputError, match="1 of 8 tensors hold NaN"):
        save_adapter(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_refusing_disk_leaves_nothing(make_trial: MakeTrial, cache: Path, tmp_path: Path) -> None:
    trial = make_trial()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="file"):
        save_adapter(attach(load(trial, cache), trial).model, tmp_path / "file" / "adapter")


def configure(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name in list(tensors)[:3]:
        tensors[name][0, 0] = float("inf")
    return tensors


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in sorted(tensors)[: len(tensors) // 2]}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"x.{name}": tensor for name, tensor in tensors.items()}


def other_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: (t[:2] if "lora_A" in n else t[:, :2]).contiguous() for n, t in tensors.items()}


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def pickle_renamed(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(64))


def pointer(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def tensor_twice(folder: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: not found"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: not found"),
    "pickle": (only_pickle, "adapter_model.bin is there, but pickled adapters"),
    "renamed pickle": (pickle_renamed, "pickle under another name"),
    "LFS pointer": (pointer, "Git LFS pointer"),
    "tensor twice": (tensor_twice, "holds a twice"),
    "config is not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "expected a JSON object"),
    "unknown type": (lambda f: configure(f, peft_type="LORE"), 'did you mean "LORA"'),
    "other type": (lambda f: configure(f, peft_type="LOHA"), "not supported here, only LORA, "),
    "auto_mapping": (lambda f: configure(f, auto_mapping={"parent_library": "evil"}), "auto_mapping.*import code"),
    "megatron": (lambda f: configure(f, megatron_config={"a": 1}, megatron_core="evil"), "megatron_core"),
    "unknown key": (lambda f: configure(f, evil=1), "evil: unknown setting"),
    "regular expression": (lambda f: configure(f, target_modules="(a+)+$"), "target_modules"),
    "pattern": (lambda f: configure(f, rank_pattern={"(a+)+$": 4}), "rank_pattern"),
    "rank 0": (lambda f: configure(f, r=0), "r: expected an integer"),
    "alpha NaN": (lambda f: configure(f, lora_alpha=float("nan")), "lora_alpha"),
    "pissa": (lambda f: configure(f, init_lora_weights="pissa"), "changes the base"),
    "Inf": (lambda f: reweigh(f, poison), "3 of 28 tensors hold NaN or Inf"),
    "half the keys": (lambda f: reweigh(f, half), "expected 28 tensors, matched 14"),
    "renamed keys": (lambda f: reweigh(f, renamed), "matched 0"),
    "other rank": (lambda f: reweigh(f, other_rank), "rank 4 in adapter_config.json, but 2 in the weights"),
    "other target": (lambda f: configure(f, target_modules=["nope"]), "does not fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason(make_trial: MakeTrial, cache: Path, folder: Path, case: str) -> None:
    damage, message = REFUSED[case]
    damage(folder)
    base = load(make_trial(), cache)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(InputError, match=message):
        load_adapter(base, folder)
    assert [name for name, _ in base.named_modules()] == names  # the base is as it was


def test_a_setting_of_another_peft_version_that_is_off_is_no_problem(
    make_trial: MakeTrial, cache: Path, folder: Path
) -> None:
    configure(folder, some_later_setting=None)
    load_adapter(load(make_trial(), cache), folder)


def test_another_base_is_named_by_its_size(folder: Path) -> None:
    with pytest.raises(InputError, match="made for hidden size 64, the model has 32"):
        load_adapter(random_network(tiny_shape("llama", tied=False), 0), folder)
