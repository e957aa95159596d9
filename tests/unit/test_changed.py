"""Weights that training has changed, saved apart from the rest: exact, whole, and never on a base they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab.adapters import changed
from lora_lab.adapters.changed import ABOUT_FILE, CHANGED_FILE, load_changed, save_changed
from lora_lab.errors import InputError, MachineError
from lora_lab.models.random import random_network
from tests.unit.test_models_random import tiny_shape

NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]


def network(*, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return random_network(tiny_shape("llama", tied=tied), seed).to(dtype)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def saved(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Of another network, so that every weight differs from the base's."""
    model = network(tied=tied, seed=7, dtype=dtype)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)  # the one weight that no seed changes
    save_changed(model, NAMES, folder, identity="sha256:abc")
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_comes_back_to_the_bit_and_nothing_else_moves(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    source, model = saved(tmp_path / "c", tied=tied, dtype=dtype), network(tied=tied, dtype=dtype)
    before, places = weights(model), [id(parameter) for parameter in model.parameters()]
    load_changed(model, tmp_path / "c", identity="sha256:abc")
    after, wanted = weights(model), weights(source)
    for name in after:
        assert torch.equal(after[name], wanted[name] if name in NAMES else before[name]), name
        assert not torch.equal(wanted[name], before[name]) or "layernorm" in name
    assert [id(parameter) for parameter in model.parameters()] == places
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, wanted[NAMES[0]])


def test_files_hold_these_tensors_and_say_so(tmp_path: Path) -> None:
    model = network(dtype=torch.bfloat16)
    size = save_changed(model, NAMES, tmp_path / "c", identity="sha256:abc")
    tensors = load_file(tmp_path / "c" / CHANGED_FILE)
    assert set(tensors) == set(NAMES) and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    about = json.loads((tmp_path / "c" / ABOUT_FILE).read_text())
    assert about == {"version": 1, "base": "sha256:abc", "tensors": sorted(NAMES)}
    assert size == sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
    assert size > 2 * sum(tensor.numel() for tensor in tensors.values())


def test_weights_in_another_layout_are_saved_as_they_are(tmp_path: Path) -> None:
    model = network()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.randn(layer.weight.shape[::-1]).T)
    assert not layer.weight.is_contiguous()
    save_changed(model, NAMES, tmp_path / "c", identity="x")
    assert torch.equal(load_file(tmp_path / "c" / CHANGED_FILE)[NAMES[1]], layer.weight)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="exists already"):
        save_changed(network(), NAMES, tmp_path / "c", identity="x")
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_saved(tmp_path: Path, value: float) -> None:
    model = network()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(InputError, match="1 of 3 tensors hold NaN or Inf"):
        save_changed(model, NAMES, tmp_path / "c", identity="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["save_file", "write_json"])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(changed, file, fail)
    with pytest.raises(MachineError):
        save_changed(network(), NAMES, tmp_path / "c", identity="x")
    assert not list(tmp_path.iterdir())


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _text(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def _about(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        about = json.loads((folder / ABOUT_FILE).read_text())
        (folder / ABOUT_FILE).write_text(json.dumps({**about, **changes}))

    return change


def _tensors(**changes: Any) -> Any:
    """By the place of a name in NAMES (`t0`): a change of that tensor, or None to leave it out. About follows."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / CHANGED_FILE)
        for key, new in changes.items():
            name = NAMES[int(key[1:])]
            old = tensors.pop(name)
            tensors |= new(name, old)
        save_file(tensors, folder / CHANGED_FILE)
        _about(tensors=sorted(tensors))(folder)

    return change


def _truncate(folder: Path) -> None:
    whole = (folder / CHANGED_FILE).read_bytes()
    (folder / CHANGED_FILE).write_bytes(whole[:-100])


def _fewer_than_named(folder: Path) -> None:
    tensors = load_file(folder / CHANGED_FILE)
    save_file({name: tensors[name] for name in NAMES[:2]}, folder / CHANGED_FILE)


DAMAGES = {
    "no tensors": (_without(CHANGED_FILE), rf"{CHANGED_FILE}.*not found"),
    "no about": (_without(ABOUT_FILE), rf"{ABOUT_FILE}.*not found"),
    "not safetensors": (_text(CHANGED_FILE, "hello"), "not a safetensors file"),
    "lfs pointer": (_text(CHANGED_FILE, "version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
    "cut": (_truncate, "not a safetensors file"),
    "not json": (_text(ABOUT_FILE, "{"), ABOUT_FILE),
    "not an object": (_text(ABOUT_FILE, "[]"), "expected version 1"),
    "version": (_about(version=2), "expected version 1"),
    "base": (_about(base="sha256:other"), r"another base \(sha256:other\), this is sha256:abc"),
    "names": (_fewer_than_named, f"does not hold the tensors that {ABOUT_FILE} names"),
    "unknown": (_tensors(t0=lambda name, old: {"model.strange": old}), "no place for: model.strange"),
    "size": (_tensors(t2=lambda name, old: {name: old[:5].clone()}), r"model.norm.weight is \(5,\).*needs \(32,\)"),
    "nan": (_tensors(t2=lambda name, old: {name: old * float("nan")}), "1 of 3 tensors hold NaN or Inf: model.norm"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    saved(tmp_path / "c")
    spoil(tmp_path / "c")
    model = network()
    before = weights(model)
    with pytest.raises(InputError, match=message):
        load_changed(model, tmp_path / "c", identity="sha256:abc")
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    _tensors(t0=lambda name, old: {"model.strange": old}, t2=lambda name, old: {name: old[:5] * float("nan")})(
        tmp_path / "c"
    )
    with pytest.raises(InputError) as caught:
        load_changed(network(), tmp_path / "c", identity="sha256:other")
    assert len(caught.value.problems) == 4
    with pytest.raises(InputError) as caught:
        load_changed(network(), tmp_path / "nothing", identity="x")
    assert len(caught.value.problems) == 2
