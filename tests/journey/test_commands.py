"""What one does with runs once they are there: list, export, compare, merge, generate, load by plain PEFT."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_lab.data.encode import encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.evaluate.heldout import score_heldout
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.trial import read_trial
from tests.journey.program import Lab, process_environment

STEPS = ("training.max_steps=4", "learning_rate=2e-2", "alpha=32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> dict[str, RunRecord]:
    """Finished runs by name."""
    lab = Lab(tmp_path_factory.mktemp("commands"), tiny_cache)
    assert lab.run("-m", *STEPS, "seed=0,1", "tag=first").code == 0
    assert lab.run(*STEPS, "rank=2", "method=rslora").code == 0
    assert lab.run(*STEPS, "method=dora", "target=all_linear").code == 0
    assert lab.run(*STEPS, "method=qlora").code == 0
    assert lab.run("training.max_steps=4", "method=full").code == 0
    assert lab.run("method=base").code == 0
    return {record.name: record for record in lab.runs()}


@pytest.fixture
def filled(runs: dict[str, RunRecord], tiny_cache: Path) -> Lab:
    """The lab with those runs."""
    return Lab(next(iter(runs.values())).folder.parent.parent, tiny_cache)


def test_runs_lists_them(filled: Lab, runs: dict[str, RunRecord]) -> None:
    answer = filled.ask("runs")
    assert answer.code == 0
    for record in runs.values():
        assert record.run_id in answer.out
        assert record.name in answer.out
    assert "7 runs" in answer.out
    assert filled.ask("runs", "--status", "failed").out.splitlines()[-1] == "0 runs"


def test_runs_as_csv_json_and_parquet_say_the_same(filled: Lab, runs: dict[str, RunRecord], tmp_path: Path) -> None:
    as_json = filled.ask("runs", "--json").json()
    as_csv = list(csv.DictReader(io.StringIO(filled.ask("runs", "--format", "csv").out)))
    parquet = tmp_path / "runs.parquet"
    assert filled.ask("runs", "--format", "parquet", "--output", str(parquet)).code == 0
    as_parquet = pyarrow.parquet.read_table(parquet).to_pylist()
    assert len(as_json) == len(as_csv) == len(as_parquet) == 7
    for json_row, csv_row, parquet_row in zip(as_json, as_csv, as_parquet, strict=True):
        result = runs[json_row["name"]].result
        assert result is not None
        loss = result.metrics["heldout/loss"].value
        assert json_row["heldout/loss"] == parquet_row["heldout/loss"] == float(csv_row["heldout/loss"]) == loss
        assert json_row["fingerprint"] == csv_row["fingerprint"] == parquet_row["fingerprint"]
        assert json_row["status"] == csv_row["status"] == "COMPLETED"
        assert json_row["trainable_parameters"] == int(csv_row["trainable_parameters"]) == result.trainable_parameters
    answer = filled.ask("runs", "--format", "parquet")
    assert answer.code == 2 and "--output" in answer.err


def test_runs_without_a_ledger(tmp_path: Path, tiny_cache: Path) -> None:
    answer = Lab(tmp_path / "nothing", tiny_cache).ask("runs")
    assert answer.code == 2
    assert "no ledger in" in answer.err
    assert not (tmp_path / "nothing").exists()


def test_a_reader_that_leaves_early_is_no_error(filled: Lab) -> None:
    command = f"{sys.executable} -m lora_lab.app.cli runs --root '{filled.root}'"
    piped = ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(piped, env=process_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_compare(filled: Lab, runs: dict[str, RunRecord]) -> None:
    a, b = runs["lora-r8-qv-s0"], runs["rslora-r2-qv-s0"]
    comparison = filled.ask("compare", a.name, b.run_id[:9], "--json").json()
    assert (comparison["a"]["run_id"], comparison["b"]["run_id"]) == (a.run_id, b.run_id)
    assert comparison["configuration"]["rank"] == {"a": 8, "b": 2}
    assert set(comparison["configuration"]) == {"rank", "method.kind"}
    assert a.result is not None and b.result is not None
    first, second = (one.result.metrics["heldout/loss"].value for one in (a, b) if one.result is not None)
    paired = {one["name"]: one for one in comparison["paired"]}["heldout/loss"]
    assert paired["difference"] == pytest.approx(second - first, rel=1e-12)
    assert paired["n"] == 8 and paired["left_out"] == 0
    assert paired["interval"]["low"] < paired["difference"] < paired["interval"]["high"]
    text = filled.ask("compare", a.name, b.name)
    assert text.code == 0 and "rslora" in text.out

    unknown = filled.ask("compare", a.name, "lora-r8-qv-s7")
    assert unknown.code == 2 and "lora-r8-qv-s" in unknown.err
    ambiguous = filled.ask("compare", a.name, "lora-r8")
    assert ambiguous.code == 2 and a.run_id in ambiguous.err


@pytest.mark.parametrize("name", ["lora-r8-qv-s0", "rslora-r2-qv-s0", "dora-r8-all_linear-s0"])
def test_an_adapter_loaded_by_plain_peft_scores_what_the_ledger_says(
    runs: dict[str, RunRecord], tiny_cache: Path, name: str
) -> None:
    record = runs[name]
    model = PeftModel.from_pretrained(_plain_base(record), record.adapter_folder)
    assert _heldout_loss(record, model, tiny_cache) == pytest.approx(_loss(record), rel=1e-6)
    base = next(one for one in runs.values() if one.name == "base")
    assert _loss(base) - _loss(record) > 1e-3, "four steps make a difference, so this test can fail"


def test_all_weights_of_a_full_run_load_by_plain_transformers(runs: dict[str, RunRecord], tiny_cache: Path) -> None:
    record = runs["full-s0"]
    model = AutoModelForCausalLM.from_pretrained(record.model_folder)
    assert _heldout_loss(record, model, tiny_cache) == pytest.approx(_loss(record), rel=1e-6)
    assert PreTrainedTokenizerFast.from_pretrained(record.model_folder).vocab_size == 256


@pytest.mark.parametrize("name", ["lora-r8-qv-s0", "rslora-r2-qv-s0", "dora-r8-all_linear-s0"])
def test_merge_into_the_base(filled: Lab, runs: dict[str, RunRecord], tmp_path: Path, name: str) -> None:
    merged = tmp_path / "merged"
    answer = filled.load("merge", name, "--output", str(merged), "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["largest_logit_difference"] < 1e-4
    assert answer.json()["bytes"] == sum(file.stat().st_size for file in merged.iterdir())
    plain = AutoModelForCausalLM.from_pretrained(merged)
    adapted = PeftModel.from_pretrained(_plain_base(runs[name]), runs[name].adapter_folder)
    assert torch.allclose(_logits(plain), _logits(adapted), atol=1e-5)
    assert not torch.allclose(_logits(plain), _logits(_plain_base(runs[name])), atol=1e-3)
    PreTrainedTokenizerFast.from_pretrained(merged)

    again = filled.load("merge", name, "--output", str(merged))
    assert again.code == 2 and "exists already" in again.err


def test_a_merged_model_is_a_base_like_any_other(filled: Lab, tmp_path: Path) -> None:
    """Loss before training: that of the run it came from."""
    merged = tmp_path / "merged"
    assert filled.load("merge", "lora-r8-qv-s0", "--output", str(merged)).code == 0
    lab = Lab(tmp_path / "lab", filled.cache)
    assert lab.run(f"model={merged}", "method=base").code == 0
    assert _loss(lab.only()) == pytest.approx(_loss(filled.find("lora-r8-qv-s0")), rel=1e-5)
    assert lab.run(f"model={merged}", "method=dora", "rank=3").code == 0


def test_merge_of_a_quantized_run_gives_plain_weights(filled: Lab, runs: dict[str, RunRecord], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    answer = filled.load("merge", "lora-nf4dq-r8-qv-s0", "--output", str(merged), "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["largest_logit_difference"] < 1e-3
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert getattr(plain.config, "quantization_config", None) is None


@pytest.mark.parametrize("kind", ["linear", "svd", "ties"])
def test_merge_of_two_runs(filled: Lab, runs: dict[str, RunRecord], tmp_path: Path, kind: str) -> None:
    a, b = runs["lora-r8-qv-s0"], runs["lora-r8-qv-s1"]
    merged = tmp_path / "merged"
    options = ["--kind", kind, "--weights", "0.25,0.75", "--json", *(["--density", "0.5"] if kind == "ties" else [])]
    answer = filled.load("merge", a.run_id, b.run_id, "--output", str(merged), *options)
    assert answer.code == 0, answer.err
    assert answer.json()["runs"] == [a.run_id, b.run_id]
    model = PeftModel.from_pretrained(_plain_base(a), merged)
    if kind == "svd":  # rank 8 of a sum of rank 16: the best approximation there is
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        wanted = 0.25 * _update(a, name) + 0.75 * _update(b, name)
        left = wanted - _delta(model, name)
        assert float(left.norm()) == pytest.approx(float(torch.linalg.svdvals(wanted)[8:].norm()), rel=1e-3)
    else:
        reference = PeftModel.from_pretrained(_plain_base(a), a.adapter_folder, adapter_name="a")
        reference.load_adapter(b.adapter_folder, adapter_name="b")
        density = 0.5 if kind == "ties" else None
        reference.add_weighted_adapter(["a", "b"], [0.25, 0.75], "c", combination_type=kind, density=density)
        reference.set_adapter("c")
        assert torch.allclose(_logits(model), _logits(reference), atol=1e-5)


def test_merges_that_cannot_be(filled: Lab, tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "merged"))
    ranks = filled.load("merge", "lora-r8-qv-s0", "rslora-r2-qv-s0", *output)
    assert ranks.code == 2 and "equal ranks" in ranks.err and "kind=svd" in ranks.err
    for name in ("full-s0", "base"):
        whole = filled.load("merge", name, *output)
        assert whole.code == 2 and "no adapter to merge" in whole.err
        second = filled.load("merge", "lora-r8-qv-s0", name, *output)
        assert second.code == 2 and "no adapter to merge" in second.err
    twice = filled.load("merge", "lora-r8-qv-s0", "lora-r8-qv-s0", *output)
    assert twice.code == 2 and "given more than once" in twice.err
    alone = filled.load("merge", "lora-r8-qv-s0", "--weights", "0.5", "--kind", "svd", *output)
    assert alone.code == 2 and "--weights" in alone.err and "--kind" in alone.err
    weights = filled.load("merge", "lora-r8-qv-s0", "lora-r8-qv-s1", "--weights", "1,nan", *output)
    assert weights.code == 2 and "nan" in weights.err
    other_base = filled.load("merge", "lora-r8-qv-s0", "lora-nf4dq-r8-qv-s0", *output)
    assert other_base.code == 0, "a 4-bit base is the same base: the adapters add up"
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


@pytest.mark.parametrize("name", ["lora-r8-qv-s0", "full-s0", "base", "lora-nf4dq-r8-qv-s0"])
def test_generate(filled: Lab, runs: dict[str, RunRecord], name: str) -> None:
    text = filled.load("generate", name, "What is 2 + 2?", "--max-new-tokens", "5")
    assert text.code == 0, text.err
    said = filled.load("generate", name, "What is 2 + 2?", "--max-new-tokens", "5", "--json").json()
    assert said["run"] == runs[name].run_id
    assert said["prompt"] == "What is 2 + 2?"
    assert text.out == said["answer"] + "\n"
    assert filled.load("generate", name, "x", "--max-new-tokens", "0").code == 2


@pytest.mark.parametrize("name", ["lora-r8-qv-s0", "full-s0"])
def test_generate_answers_as_plain_transformers_does(filled: Lab, runs: dict[str, RunRecord], name: str) -> None:
    record = runs[name]
    base = _plain_base(record)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base.name_or_path)
    if name == "full-s0":
        model = AutoModelForCausalLM.from_pretrained(record.model_folder)
    else:
        model = PeftModel.from_pretrained(base, record.adapter_folder)
    prompt = [{"role": "user", "content": "abc"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    wanted = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert filled.load("generate", record.name, "abc", "--max-new-tokens", "6", "--json").json()["answer"] == wanted
    assert wanted


def test_a_run_without_an_adapter_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_lab import restore

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(restore, "load_base", fail)
    assert lab.run("seed=0").code == 3
    for command in (("generate", "lora-r8-qv-s0", "x"), ("merge", "lora-r8-qv-s0", "--output", str(lab.root / "m"))):
        answer = lab.load(*command)
        assert answer.code == 2, answer.err
        assert "FAILED" in answer.err and "Traceback" not in answer.err


def _loss(record: RunRecord) -> float:
    assert record.result is not None
    return record.result.metrics["heldout/loss"].value


def _plain_base(record: RunRecord) -> Any:
    """The base by transformers alone, from the folder that the result names."""
    assert record.result is not None
    return AutoModelForCausalLM.from_pretrained(record.result.facts["model_folder"])


def _heldout_loss(record: RunRecord, model: Any, cache: Path) -> float:
    data = read_trial(json.loads((record.folder / "trial.json").read_text())["trial"]).data
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_plain_base(record).name_or_path)
    encoded = encode_rows(load_rows(data, cache=cache).heldout, tokenizer, data, vocab_size=260)
    scores = score_heldout(model, encoded.examples, pad_id=tokenizer.pad_token_id, batch_size=16, device="cpu")
    return scores.metrics["heldout/loss"].value


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=torch.arange(40).reshape(2, 20)).logits
    return logits


def _update(record: RunRecord, name: str) -> torch.Tensor:
    return _delta(PeftModel.from_pretrained(_plain_base(record), record.adapter_folder), name)


def _delta(model: Any, name: str) -> torch.Tensor:
    weight: torch.Tensor = model.get_submodule(name).get_delta_weight(model.active_adapter)
    return weight.detach()
