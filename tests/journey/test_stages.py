"""Stages: a run that starts from a finished one, by its adapter or by its weights, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lora_lab  # noqa: F401  # registers the lab's own adapters with PEFT
from lora_lab import restore
from lora_lab.adapters.changed import load_changed
from lora_lab.data.encode import encode_rows, stop_ids
from lora_lab.data.sources import load_rows
from lora_lab.record.layer_log import read_observations
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import read_steps
from lora_lab.schema.method import METHODS
from lora_lab.schema.trial import read_trial
from tests.contract.test_every_method import ROWS
from tests.journey.program import Answer, Lab, lines_of, wait_until
from tests.tiers import mostly_slow

# Four rows, all in the one batch of every step, so that a step's loss is that of the whole set.
SHORT = ("data.train_size=4", "training.max_steps=3", "learning_rate=0.05")
CONTINUED = (
    *("lora", "rslora", "dora", "lora_plus", "ia3", "prompt_tuning", "prefix_tuning", "bottleneck"),
    *("mov", "molora", "loramoe", "mola"),
)
MERGED = ("lora", "rslora", "dora", "lora_plus", "pissa", "olora", "adalora", "ia3", "full", "freeze", "lisa", "galore")
EXACT = [method for method, row in ROWS.items() if row.is_exact_start]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Lab:
    """A finished run of every method, and those that nobody can start from."""
    lab = Lab(tmp_path_factory.mktemp("parents"), tiny_cache)
    for method in ROWS:
        ran(lab, *settings(method))
    ran(lab, "method=base")
    for changed in ("model.seed=1", "model.shape.mlp_size=96", "quantization=nf4", "rank=5", "alpha=1", "target=mlp"):
        ran(lab, *SHORT, "seed=8", changed)
    ran(lab, *SHORT, "seed=8", "model.shape.tied_embeddings=true", "model.tie_embeddings=false")
    ran(lab, *settings("prefix_tuning"), "method.projection=true")
    assert lab.run("learning_rate=1e30", "method=full", "seed=8", "training.max_gradient_norm=null").code == 3
    return lab


@pytest.fixture
def copy(parents: Lab, tmp_path: Path) -> Lab:
    """The finished runs, in a lab of this test's own."""
    shutil.copytree(parents.root, tmp_path / "copy")
    return Lab(tmp_path / "copy", parents.cache)


def settings(method: str) -> tuple[str, ...]:
    return (f"method={method}", *ROWS[method].settings, *SHORT)


def ran(lab: Lab, *overrides: str) -> RunRecord:
    """The one run that the call has added."""
    before = {record.run_id for record in lab.runs()}
    answer = lab.run(*overrides)
    assert answer.code == 0, answer.err
    (new,) = [record for record in lab.runs() if record.run_id not in before]
    return new


def of_method(lab: Lab, method: str) -> RunRecord:
    """The first run of a method: that of the plain settings."""
    return next(record for record in lab.runs() if record.trial["method"]["kind"] == method)


def where(lab: Lab, **values: Any) -> RunRecord:
    """The one run whose trial has these values at dotted keys (`__` for the dot)."""
    (found,) = [record for record in lab.runs() if all(_at(record.trial, key) == one for key, one in values.items())]
    return found


def _at(node: Any, key: str) -> Any:
    for step in key.split("__"):
        node = node.get(step)
    return node


def first_loss(record: RunRecord) -> float:
    """Of the model before its first update."""
    loss: float = read_steps(record.steps_path)[0]["loss"]
    return loss


def scored_by_hand(record: RunRecord, cache: Path, *, on: RunRecord | None = None) -> float:
    """Mean negative log-likelihood of the loss tokens of `on`'s training rows, by transformers and PEFT alone."""
    data = read_trial((on or record).trial).data
    model = loaded_by_hand(record)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder_of_base(record))
    total, count = 0.0, 0
    for row in encode_rows(load_rows(data, cache=cache).train, tokenizer, data, vocab_size=260).examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, -len(row.input_ids) :]
        scores = torch.log_softmax(logits.double(), dim=-1)
        for position in range(1, len(row.input_ids)):
            if row.loss_mask[position]:
                total -= float(scores[position - 1, row.input_ids[position]])
                count += 1
    return total / count


def folder_of_base(record: RunRecord) -> str:
    assert record.result is not None
    return str(record.result.facts["model_folder"])


def loaded_by_hand(record: RunRecord) -> Any:
    """The model of a run on the plain base."""
    form = METHODS[record.trial["method"]["kind"]].saves
    if form == "model":
        return AutoModelForCausalLM.from_pretrained(record.model_folder)
    base = AutoModelForCausalLM.from_pretrained(folder_of_base(record))
    if form == "changed":
        load_changed(base, record.saved_folder("changed"), identity="random")
    return PeftModel.from_pretrained(base, record.adapter_folder).eval() if form == "adapter" else base.eval()


def refused(lab: Lab, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said; nothing may be loaded, nothing written."""
    before = [record.run_id for record in lab.runs()]
    with monkeypatch.context() as patch:
        patch.setattr(restore, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
        answer: Answer = lab.run(*overrides)
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    assert [record.run_id for record in lab.runs()] == before
    return answer.err


@pytest.mark.parametrize("method", METHODS)
def test_generate_answers_as_greedy_decoding_by_hand(parents: Lab, method: str) -> None:
    record = of_method(parents, method)
    answer = parents.load("generate", record.run_id, "abc", "--max-new-tokens", "6", "--json")
    assert answer.code == 0, answer.err
    base = folder_of_base(record)
    model = AutoModelForCausalLM.from_pretrained(base) if method == "base" else loaded_by_hand(record)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    prompt = [{"role": "user", "content": "abc"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    new: list[int] = []
    while len(new) < 6 and (not new or new[-1] not in stop_ids(tokenizer, "auto")):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    assert answer.json()["answer"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("method", mostly_slow(CONTINUED, keep=("dora", "prefix_tuning", "mola")))
def test_an_adapter_is_trained_on_from_exactly_its_weights(copy: Lab, method: str) -> None:
    parent = of_method(copy, method)
    child = ran(copy, *settings(method), "data.train_seed=7", f"init_from={parent.run_id}")
    expected = scored_by_hand(parent, copy.cache, on=child)
    assert first_loss(child) == pytest.approx(expected, rel=1e-6)
    fresh = ran(copy, *settings(method), "data.train_seed=7")
    assert abs(first_loss(fresh) - expected) > 1e-4, "else it could have started anew"
    ids = torch.arange(26).reshape(2, 13)
    _, _, restored = restore.Restorer(Ledger(copy.root), copy.cache, torch.device("cpu")).model_of(child)
    with torch.no_grad():
        torch.testing.assert_close(restored(ids).logits, loaded_by_hand(child)(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", mostly_slow(MERGED, keep=("lora", "ia3", "lisa")))
def test_weights_of_a_run_are_the_base_of_another(copy: Lab, method: str) -> None:
    parent = of_method(copy, method)
    child = ran(copy, *settings("lora"), "data.train_seed=7", f"init_from={parent.run_id}", "init_as=weights")
    expected = scored_by_hand(parent, copy.cache, on=child)
    assert first_loss(child) == pytest.approx(expected, rel=1e-5)
    fresh = ran(copy, *settings("lora"), "data.train_seed=7")
    assert abs(first_loss(fresh) - expected) > 1e-4, "else it could have started from the plain model"


@pytest.mark.parametrize("method", mostly_slow(ROWS, keep=("dora", "prompt_tuning", "full")))
def test_every_method_starts_from_another_runs_weights(copy: Lab, method: str) -> None:
    parent = of_method(copy, "lora")
    child = ran(copy, *settings(method), "data.train_seed=7", f"init_from={parent.run_id}", "init_as=weights")
    if method in EXACT:
        assert first_loss(child) == pytest.approx(scored_by_hand(parent, copy.cache, on=child), rel=1e-5)
    assert copy.load("generate", child.run_id, "x", "--max-new-tokens", "3").code == 0
    on_plain = AutoModelForCausalLM.from_pretrained(folder_of_base(parent))
    if METHODS[method].saves == "adapter":
        config = json.loads((child.adapter_folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None, "the plain model is not what it belongs on"
    elif METHODS[method].saves == "changed":
        with pytest.raises(Exception, match="belongs to another base"):
            load_changed(on_plain, child.saved_folder("changed"), identity="random")


def test_the_parent_is_in_the_fingerprint_whatever_it_is_called(copy: Lab) -> None:
    first, second = where(copy, rank=5), where(copy, alpha=1.0)
    lora = of_method(copy, "lora")
    plain = copy.plan(*settings("lora"), "--json").json()[0]
    found = {}
    for name in (lora.name, lora.run_id, lora.run_id[:9], lora.header.fingerprint):  # type: ignore[union-attr]
        (found[name],) = copy.plan(*settings("lora"), f"init_from={name}", "--json").json()
    assert len({row["fingerprint"] for row in found.values()}) == 1
    assert len({row["name"] for row in found.values()}) == 1
    other = of_method(copy, "full")
    rows = [
        copy.plan(*settings("lora"), f"init_from={one.run_id}", "init_as=weights", "--json").json()[0]
        for one in (lora, other, first, second)
    ]
    prints = [plain["fingerprint"], found[lora.name]["fingerprint"], *(row["fingerprint"] for row in rows)]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    ("overrides", "parent", "said"),
    [
        ((), {"model__seed": 1}, "another base: model.seed is 1 there and 0 here"),
        ((), {"model__shape__mlp_size": 96}, "model.shape.mlp_size is 96 there and 128 here"),
        (("init_as=weights",), {"model__seed": 1}, "model.seed is 1 there and 0 here"),
        (
            ("model.shape.tied_embeddings=true",),
            {"model__tie_embeddings": False},
            "model.tie_embeddings is false there and null here",
        ),
        ((), {"quantization__kind": "nf4"}, "quantization is nf4 there and none here"),
        (("init_as=weights",), {"quantization__kind": "nf4"}, "quantization=none"),
        (("init_as=weights", "quantization=nf4"), {"method__kind": "rslora"}, "this trial's is quantized as nf4"),
        ((), {"rank": 5}, "rank is 5 there and 8 here"),
        ((), {"alpha": 1.0}, "alpha is 1.0 there and 16.0 here"),
        ((), {"target__mlp": True, "method__kind": "lora", "seed": 8}, "target is mlp there and query, value here"),
        ((), {"method__kind": "rslora"}, "method is rslora there and lora here"),
        ((), {"method__kind": "full", "learning_rate": 0.05}, "use init_as=weights"),
        ((), {"method__kind": "base"}, "has trained nothing"),
        ((), {"learning_rate": 1e30}, "is DIVERGED; expected a completed run"),
        (("method=base",), {"method__kind": "rslora"}, "method=base trains nothing"),
        (("method=full",), {"method__kind": "rslora"}, "init_as: method=full trains the model's own weights"),
    ],
)
def test_what_cannot_be_started_from(
    parents: Lab, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], parent: dict[str, Any], said: str
) -> None:
    name = where(parents, **parent).run_id
    answer = refused(parents, *SHORT, *overrides, f"init_from={name}", monkeypatch=monkeypatch)
    assert said in answer and ("init_from" in answer or "init_as" in answer)


@pytest.mark.parametrize("method", ["p_tuning", "pissa", "olora", "adalora"])
def test_adapters_that_are_saved_as_less_than_they_train(
    parents: Lab, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    name = of_method(parents, method).run_id
    said = refused(parents, *settings(method), f"init_from={name}", monkeypatch=monkeypatch)
    assert f"what a {method} saves is less than what it trains" in said
    assert ("use init_as=weights" in said) == (method != "p_tuning")


def test_a_projected_prefix_is_not_trained_on(parents: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (*settings("prefix_tuning"), "method.projection=true")
    name = where(parents, method__projection=True).run_id
    said = refused(parents, *overrides, f"init_from={name}", monkeypatch=monkeypatch)
    assert "less than what it trains" in said and "init_as=weights" not in said


@pytest.mark.parametrize("method", sorted(set(ROWS) - set(MERGED)))
def test_methods_that_no_weight_equals(parents: Lab, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    name = of_method(parents, method).run_id
    said = refused(parents, *SHORT, f"init_from={name}", "init_as=weights", monkeypatch=monkeypatch)
    assert f"is of method={method}, which cannot be merged into weights" in said
    assert ("init_as=adapter" in said) == (method in CONTINUED)


def test_no_such_run_names_the_nearest(parents: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(parents, *SHORT, "init_from=dorra-r8-qv-s0", monkeypatch=monkeypatch)
    assert 'init_from: no run "dorra-r8-qv-s0"' in said
    assert "init_from: empty value" in refused(parents, *SHORT, "init_from=''", monkeypatch=monkeypatch)
    several = refused(parents, *SHORT, "init_from=lora", monkeypatch=monkeypatch)
    assert 'init_from: "lora" fits' in several


def test_three_stages(copy: Lab, tmp_path: Path) -> None:
    """Merged, then an adapter on that, then this adapter trained on: which still lies on the first one's weights."""
    tuning = of_method(copy, "lora")
    second = ran(copy, *SHORT, "method=dora", f"init_from={tuning.run_id}", "init_as=weights", "data.train_seed=5")
    third = ran(copy, *SHORT, "method=dora", f"init_from={second.run_id}", "data.train_seed=6")
    shutil.rmtree(second.folder)  # nothing of it is needed any more
    one = AutoModelForCausalLM.from_pretrained(folder_of_base(tuning))
    one = PeftModel.from_pretrained(one, tuning.adapter_folder).merge_and_unload()
    by_hand = PeftModel.from_pretrained(one, third.adapter_folder).eval()
    ids = torch.arange(26).reshape(2, 13)
    _, _, restored = restore.Restorer(Ledger(copy.root), copy.cache, torch.device("cpu")).model_of(third)
    with torch.no_grad():
        torch.testing.assert_close(restored(ids).logits, by_hand(ids).logits, rtol=0, atol=1e-5)
    answer = copy.load("merge", third.run_id, "--output", str(tmp_path / "merged"), "--json")
    assert answer.code == 0, answer.err
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, by_hand(ids).logits, rtol=0, atol=1e-5)
    last = ran(copy, *settings("full"), f"init_from={third.run_id}", "init_as=weights")
    assert first_loss(last) == pytest.approx(_loss_of(by_hand, last, copy.cache), rel=1e-5)
    other = copy.load("merge", third.run_id, tuning.run_id, "--output", str(tmp_path / "two"))
    assert other.code == 2 and "another base" in other.err


def _loss_of(model: Any, record: RunRecord, cache: Path) -> float:
    trial = read_trial(record.trial)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder_of_base(record))
    encoded = encode_rows(load_rows(trial.data, cache=cache).train, tokenizer, trial.data, vocab_size=260)
    total, count = 0.0, 0
    for row in encoded.examples:
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits[0].double(), dim=-1)
        picked = [scores[i - 1, row.input_ids[i]] for i in range(1, len(row.input_ids)) if row.loss_mask[i]]
        total, count = total - float(sum(picked)), count + len(picked)
    return total / count


@pytest.mark.slow
def test_a_killed_stage_is_tried_again_from_the_same_parent(copy: Lab) -> None:
    """The same command, with the parent by its name: the child's name must not have made that name ambiguous."""
    parent = of_method(copy, "lora")
    sweep = ("-m", f"init_from={parent.name}", "seed=0,1", "training.max_steps=60", "data.train_size=16")
    sweep += ("launch.cohort=off",)  # one after the other, so that one is done while the other trains
    count = len(copy.runs())
    process = copy.start(*sweep)
    wait_until(lambda: len(copy.runs()) == count + 2 and lines_of(copy.runs()[-1].steps_path) > 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    first, killed = copy.runs()[count:]
    done = (first.folder / "result.json").read_bytes()
    answer = copy.run(*sweep)
    assert answer.code == 0, answer.err
    assert (first.folder / "result.json").read_bytes() == done
    assert [record.attempts for record in copy.runs()[count:]] == [1, 2]
    again = next(record for record in copy.runs() if record.run_id == killed.run_id)
    assert again.state == Status.COMPLETED
    assert len(copy.runs()) == count + 2


@pytest.mark.parametrize("init_as", ["adapter", "weights"])
def test_a_parent_that_goes_away_fails_the_run(copy: Lab, monkeypatch: pytest.MonkeyPatch, init_as: str) -> None:
    from lora_lab.app import execution

    parent = of_method(copy, "lora")
    check = execution.check_before_loading

    def gone(*arguments: Any) -> None:
        check(*arguments)
        shutil.rmtree(parent.folder)

    monkeypatch.setattr(execution, "check_before_loading", gone)
    answer = copy.run(*settings("lora"), f"init_from={parent.run_id}", f"init_as={init_as}")
    assert answer.code == 3
    child = max(copy.runs(), key=lambda record: record.header.claimed_at if record.header else "")
    assert child.state == Status.FAILED and child.result is not None and child.result.reason is not None
    assert child.result.reason.startswith("init_from: the run it is built on")
    assert parent.run_id in child.result.reason
    assert not (child.folder / "traceback.txt").exists()


def test_an_axis_of_parents_in_tables_and_comparisons(copy: Lab) -> None:
    names = [of_method(copy, method).name for method in ("lora", "dora")]
    answer = copy.run("-m", *SHORT, f"init_from={','.join(names)},null", "init_as=weights", "seed=3,4", "--json")
    assert answer.code == 0, answer.err
    rows = answer.json()["rows"]
    assert {row["axes"]["init_from"] for row in rows} == {*names, None}
    assert [row["completed"] for row in rows] == [2, 2, 2]
    children = [record for record in copy.runs() if record.trial["seed"] == 3 and record.trial["init_from"]]
    told = copy.ask("compare", *(record.run_id for record in children), "--json").json()
    assert told["configuration"]["init_from"] == {"a": names[0], "b": names[1]}
    assert all(record.run_id in copy.ask("runs").out for record in children)


def test_lisa_draws_by_the_norms_of_two_runs(copy: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    full, lora = of_method(copy, "full"), of_method(copy, "lora")
    overrides = ("method=lisa", "method.probabilities=from_norm_log", "method.layers=1", "method.interval=1", *SHORT)
    seen: dict[str, Any] = {}
    attach = restore.importance_probabilities

    def noted(*arguments: Any, **options: Any) -> list[float]:
        seen["p"] = attach(*arguments, **options)
        return seen["p"]  # type: ignore[no-any-return]

    monkeypatch.setattr(restore, "importance_probabilities", noted)
    child = ran(copy, *overrides, f"method.norm_log=[{full.name},{lora.run_id}]")
    means = []
    for record in (full, lora):
        lines = [line["update"] for line in read_observations(record.layers_path, "norms")]
        means.append([sum(line[str(layer)] for line in lines) / len(lines) for layer in range(2)])
    ratios = [one / other for other, one in zip(*means, strict=True)]
    assert seen["p"] == pytest.approx([ratio / sum(ratios) for ratio in ratios]), "the paper's p, with a sum of gamma"
    assert child.header is not None
    assert child.header.identities["norms_full"] == full.header.fingerprint  # type: ignore[union-attr]
    spelled = copy.plan(*overrides, f"method.norm_log=[{full.run_id},{lora.name}]", "--json").json()[0]
    assert (spelled["fingerprint"], spelled["state"]) == (child.header.fingerprint, "done")


@pytest.mark.parametrize(
    ("norm_log", "said"),
    [
        (("lora", "full"), "the first of norm_log must be a run of method=full"),
        (("full", "full"), "the second of norm_log must be a LoRA"),
        (("full", "dora"), "the second of norm_log must be a LoRA"),
        (("full", "nope"), 'method.norm_log: no run "nope"'),
        (("full",), "two runs: one of full fine-tuning, one of LoRA"),
    ],
)
def test_norm_logs_that_say_nothing(
    parents: Lab, monkeypatch: pytest.MonkeyPatch, norm_log: tuple[str, ...], said: str
) -> None:
    ids = [name if name == "nope" else of_method(parents, name).run_id for name in norm_log]
    overrides = ("method=lisa", "method.probabilities=from_norm_log", f"method.norm_log=[{','.join(ids)}]", *SHORT)
    answer = refused(parents, *overrides, "method.layers=1", monkeypatch=monkeypatch)
    assert said in answer and "method" in answer


def test_norm_logs_of_another_base_or_without_norms(copy: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    full, lora = of_method(copy, "full"), of_method(copy, "lora")
    overrides = ("method=lisa", "method.probabilities=from_norm_log", "method.layers=1", *SHORT)
    other = where(copy, model__seed=1).run_id
    said = refused(copy, *overrides, f"method.norm_log=[{full.run_id},{other}]", monkeypatch=monkeypatch)
    assert "another base: model.seed is 1" in said
    full.layers_path.unlink()
    said = refused(copy, *overrides, f"method.norm_log=[{full.run_id},{lora.run_id}]", monkeypatch=monkeypatch)
    assert "has no log of how far its layers moved" in said
