"""`merge` of finished runs: several into one adapter or into the base, and what is refused before a model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_lab.app import merge_command
from lora_lab.record.run_record import RunRecord
from tests.journey.program import Lab

STEPS = ("training.max_steps=3", "learning_rate=2e-2", "alpha=32")
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Lab:
    """Finished runs of several methods."""
    lab = Lab(tmp_path_factory.mktemp("merging"), tiny_cache)
    for overrides in (
        ("tag=a",),
        ("tag=b", "seed=1", "rank=2", "method=rslora", "target=all_linear"),
        ("tag=int8", "quantization=int8"),
        ("tag=dora", "method=dora"),
        ("tag=ia3", "method=ia3"),
        ("tag=bottleneck", "method=bottleneck"),
        ("tag=prompt", "method=prompt_tuning", "method.virtual_tokens=4"),
        ("tag=freeze", "method=freeze", "method.last_layers=1"),
    ):
        answer = lab.run(*STEPS, *overrides)
        assert answer.code == 0, answer.err
    return lab


def run_of(lab: Lab, tag: str) -> RunRecord:
    (record,) = [record for record in lab.runs() if record.header is not None and record.header.tag == tag]
    return record


def base_of(record: RunRecord) -> Any:
    assert record.result is not None
    return AutoModelForCausalLM.from_pretrained(record.result.facts["model_folder"])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def weighted_sum(lab: Lab, weights: dict[str, float]) -> Any:
    """The base with every update of PEFT's own loading added by hand."""
    plain = base_of(run_of(lab, "a"))
    for tag, weight in weights.items():
        adapted = PeftModel.from_pretrained(base_of(run_of(lab, tag)), run_of(lab, tag).adapter_folder)
        for name, layer in adapted.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight"):
                with torch.no_grad():
                    plain.get_submodule(name).weight += weight * layer.get_delta_weight("default")
    return plain


def test_several_runs_into_the_base_are_their_weighted_sum(merging: Lab, tmp_path: Path) -> None:
    a, b = run_of(merging, "a"), run_of(merging, "b")
    merged = tmp_path / "merged"
    options = ("--into-base", "--weights", "0.5,-0.25", "--output", str(merged), "--json")
    answer = merging.load("merge", a.run_id, b.run_id, *options)
    assert answer.code == 0, answer.err
    report = answer.json()
    assert (report["kind"], report["weights"], report["runs"]) == ("cat", [0.5, -0.25], [a.run_id, b.run_id])
    assert report["largest_logit_difference"] < 1e-5 and report["dequantized"] is None
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(logits(plain), logits(weighted_sum(merging, {"a": 0.5, "b": -0.25})), atol=1e-5)
    assert not torch.allclose(logits(plain), logits(base_of(a)), atol=1e-3)


def test_a_concatenation_is_the_same_sum_as_an_adapter(merging: Lab, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    names = (run_of(merging, "a").run_id, run_of(merging, "b").run_id)
    answer = merging.load("merge", *names, "--kind", "cat", "--weights", "1,1", "--output", str(merged), "--json")
    assert answer.code == 0, answer.err
    model = PeftModel.from_pretrained(base_of(run_of(merging, "a")), merged)
    assert torch.allclose(logits(model), logits(weighted_sum(merging, {"a": 1.0, "b": 1.0})), atol=1e-5)
    assert model.peft_config["default"].r == 10


def test_dare_is_drawn_from_its_seed(merging: Lab, tmp_path: Path) -> None:
    a, other = run_of(merging, "a").run_id, run_of(merging, "int8").run_id
    files = []
    for folder, seed in (("none", ()), ("zero", ("--seed", "0")), ("one", ("--seed", "1"))):
        options = ("--kind", "dare", "--density", "0.5", *seed, "--output", str(tmp_path / folder), "--json")
        answer = merging.load("merge", a, other, *options)
        assert answer.code == 0, answer.err
        assert answer.json()["kind"] == "dare_linear" and answer.json()["seed"] == (1 if folder == "one" else 0)
        files.append((tmp_path / folder / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_an_int8_run_gives_plain_weights_and_says_what_it_cost(merging: Lab, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    answer = merging.load("merge", run_of(merging, "int8").run_id, "--output", str(merged), "--json")
    assert answer.code == 0, answer.err
    report = answer.json()
    assert (report["dequantized"], report["precision"]) == ("int8", "fp32")
    assert 1e-5 < report["largest_logit_difference"] < 0.1
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert getattr(plain.config, "quantization_config", None) is None


def test_vectors_are_merged_alone(merging: Lab, tmp_path: Path) -> None:
    record = run_of(merging, "ia3")
    answer = merging.load("merge", record.run_id, "--output", str(tmp_path / "merged"), "--json")
    assert answer.code == 0, answer.err
    adapted = PeftModel.from_pretrained(base_of(record), record.adapter_folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["bottleneck"], "method=bottleneck cannot be merged: an activation stands between"),
        (["prompt"], "method=prompt_tuning cannot be merged: it puts virtual tokens"),
        (["freeze"], "method=freeze has no adapter to merge: it trained the model's own weights"),
        (["a", "bottleneck"], "cannot be merged"),
        (["a", "dora"], "magnitudes cannot be combined; merge it alone"),
        (["a", "ia3"], "multiplies weights where the others add to them; merge it alone"),
    ],
)
def test_runs_that_cannot_be_merged_say_why_before_a_model_loads(
    merging: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: list[str], message: str
) -> None:
    monkeypatch.setattr(merge_command, "load_run", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    names = [run_of(merging, tag).run_id for tag in tags]
    answer = merging.load("merge", *names, "--output", str(tmp_path / "merged"))
    assert answer.code == 2 and message in answer.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kind", "dare"), "--density: goes with kind=ties, dare_linear, dare_ties"),
        (("--kind", "ties", "--density", "0.5", "--seed", "1"), "--seed: goes with kind=dare_linear, dare_ties"),
        (("--kind", "dare", "--density", "0.5", "--seed", "-1"), "0 <= seed < 2^63"),
        (("--kind", "cats"), 'did you mean "cat"'),
        (("--weights", "1"), "--weights: expected one per adapter (2), got 1"),
        (("--weights", "1,x"), "expected numbers as 0.5,0.5"),
    ],
)
def test_options_that_do_not_fit_say_so_before_a_model_loads(
    merging: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(merge_command, "load_run", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    names = (run_of(merging, "a").run_id, run_of(merging, "b").run_id)
    answer = merging.load("merge", *names, "--output", str(tmp_path / "merged"), *options)
    assert answer.code == 2 and message in answer.err


def test_options_of_several_runs_are_not_for_one(merging: Lab, tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "merged"))
    answer = merging.load("merge", run_of(merging, "a").run_id, "--seed", "0", "--density", "0.5", *output)
    assert answer.code == 2 and "--seed" in answer.err and "--density" in answer.err
