"""Many adapters on one loaded base: bit for bit what a fresh load of each scores, and the base is left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_lab.adapters.attach import attach
from lora_lab.adapters.changed import save_changed
from lora_lab.adapters.save import load_adapter, save_adapter, save_model
from lora_lab.adapters.taken_off import adapter_on
from lora_lab.errors import EvaluationError, InputError
from lora_lab.evaluate import many_adapters
from lora_lab.evaluate.harness import Scores, evaluate_model
from lora_lab.evaluate.many_adapters import evaluate_adapters
from lora_lab.evaluate.weights_digest import weights_digest
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.schema.evaluation import Evaluation
from tests.conftest import MakeTrial
from tests.evaluation_samples import evaluation
from tests.tiers import mostly_slow
from tests.tuner_bases import shaken

pytestmark = pytest.mark.usefixtures("one_core")

# Kinds of adapter, each with what makes it fit the tiny model; pissa and olora are saved as plain LoRA.
KINDS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "dora": (),
    "pissa": (),
    "adalora": ("rank=4", "method.initial_rank=6"),
    "ia3": (),
    "prompt_tuning": ("method.virtual_tokens=3",),
    "p_tuning": ("method.virtual_tokens=3",),
    "prefix_tuning": ("method.virtual_tokens=3",),
    "bottleneck": (),
    "mov": ("method.experts=2",),
    "molora": ("method.experts=2",),
}
UNQUANTIZED = ("pissa",)
LONG = "model.shape.max_positions=512"
TASKS = evaluation("skills_trained", "prose_perplexity", skills={"documents": 4, "seed": 0}, limit=2)


def loaded(make_trial: MakeTrial, cache: Path, *settings: str) -> LoadedBase:
    trial = make_trial("method=base", LONG, *settings)
    return load_base(
        trial.model, precision=trial.training.precision, quantization=trial.quantization, device="cpu", cache=cache
    )


def saved(make_trial: MakeTrial, cache: Path, folder: Path, kind: str, *settings: str) -> Path:
    """An adapter whose weights have all moved away from its start."""
    trial = make_trial(f"method={kind}", LONG, *KINDS[kind], *settings)
    base = loaded(make_trial, cache, *settings)
    attached = attach(base.model, trial, tokenizer=base.tokenizer, steps=10)
    save_adapter(shaken(attached.model), folder)
    return folder


def answers(folder: Path) -> dict[str, Any]:
    """Every answer the model gave, from the files of an evaluation: floats as JSON spells them, to the last bit."""
    found = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        found[path.name] = [json.loads(line)["resps"] for line in path.read_text().splitlines()]
    return found


def score_alone(base: LoadedBase, folder: Path, cache: Path, output: Path) -> Scores:
    model = load_adapter(base.model, folder)
    return evaluate_model(model, base.tokenizer, TASKS, cache=cache, output=output)


@pytest.mark.parametrize(
    "settings",
    mostly_slow([(), ("quantization=nf4",), ("quantization=int8",)], keep=[()]),
    ids=["fp32", "nf4", "int8"],
)
def test_equal_to_a_fresh_load_of_each(
    make_trial: MakeTrial, shared: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    kinds = [kind for kind in KINDS if not settings or kind not in UNQUANTIZED]
    folders = {kind: saved(make_trial, shared, tmp_path / "saved" / kind, kind, *settings) for kind in kinds}
    order = dict([*folders.items(), ("lora_again", folders["lora"])])
    base = loaded(make_trial, shared, *settings)
    many = evaluate_adapters(base.model, base.tokenizer, order, TASKS, cache=shared, output=tmp_path / "many")
    assert list(many) == list(order)
    guarded = {name: one.facts["engine"][0]["guard_remembered"] for name, one in many.items()}
    # Once per kind of adapter: a saved PiSSA is a LoRA.
    assert [name for name, is_known in guarded.items() if is_known] == [*(["pissa"] * (not settings)), "lora_again"]
    seen = {}
    for kind, folder in folders.items():
        fresh = loaded(make_trial, shared, *settings)
        alone = score_alone(fresh, folder, shared, tmp_path / "alone" / kind)
        assert alone.metrics == many[kind].metrics
        seen[kind] = answers(tmp_path / "alone" / kind)
        assert seen[kind] == answers(tmp_path / "many" / kind)
    assert answers(tmp_path / "many" / "lora_again") == seen["lora"]
    assert len({json.dumps(one) for one in seen.values()}) == len(kinds), "each adapter has scores of its own"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [(), ("quantization=nf4",), ("quantization=int8",)], ids=["fp32", "nf4", "int8"])
def test_the_base_is_left_as_it_was(
    make_trial: MakeTrial, shared: Path, tmp_path: Path, kind: str, settings: tuple[str, ...]
) -> None:
    if settings and kind in UNQUANTIZED:
        return
    folder = saved(make_trial, shared, tmp_path / "saved", kind, *settings)
    model = loaded(make_trial, shared, *settings).model
    trainable = next(iter(model.parameters()))  # a flag that PEFT does not leave alone
    trainable.requires_grad_(True)
    model.train()
    before, tree = weights_digest(model), dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with adapter_on(model, folder) as wrapped:
        assert weights_digest(wrapped) != before
        wrapped.generate(input_ids=torch.arange(6)[None], max_new_tokens=2, pad_token_id=256)
    assert weights_digest(model) == before
    assert {name: id(one) for name, one in model.named_modules()} == {name: id(one) for name, one in tree.items()}
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(now) == list(tensors) and all(now[name] is tensors[name] for name in tensors)
    assert trainable.requires_grad and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "peft_config" not in vars(model) and "prepare_inputs_for_generation" not in vars(model)


def test_modules_to_save_and_embeddings_come_off(make_trial: MakeTrial, shared: Path, tmp_path: Path) -> None:
    """A whole module beside the adapter, and an adapter on the embedding."""
    config = LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    save_adapter(shaken(get_peft_model(loaded(make_trial, shared).model, config)), tmp_path / "saved")
    base = loaded(make_trial, shared)
    before = weights_digest(base.model)
    folders = {"one": tmp_path / "saved", "two": tmp_path / "saved"}
    scores = evaluate_adapters(base.model, base.tokenizer, folders, TASKS, cache=shared, output=tmp_path / "many")
    assert weights_digest(base.model) == before
    alone = score_alone(loaded(make_trial, shared), tmp_path / "saved", shared, tmp_path / "alone")
    assert scores["one"].metrics == scores["two"].metrics == alone.metrics
    assert answers(tmp_path / "many" / "two") == answers(tmp_path / "alone")


def test_an_error_takes_the_adapter_off_too(make_trial: MakeTrial, shared: Path, tmp_path: Path) -> None:
    folder = saved(make_trial, shared, tmp_path / "saved", "mov")
    model = loaded(make_trial, shared).model
    before = weights_digest(model)
    with pytest.raises(KeyboardInterrupt), adapter_on(model, folder):
        raise KeyboardInterrupt
    assert weights_digest(model) == before


def test_a_base_that_was_changed_is_an_error(
    make_trial: MakeTrial, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(make_trial, shared, tmp_path / "saved", "lora")
    base = loaded(make_trial, shared)
    scored: list[Path] = []

    def merging(model: Any, _tokenizer: Any, _evaluation: Evaluation, *, output: Path, **_: object) -> Scores:
        scored.append(output)
        model.merge_adapter()
        return Scores({}, {}, {}, 0.0)

    monkeypatch.setattr(many_adapters, "evaluate_model", merging)
    with pytest.raises(EvaluationError, match="left the base changed"):
        evaluate_adapters(
            base.model, base.tokenizer, {"a": folder, "b": folder}, TASKS, cache=shared, output=tmp_path / "many"
        )
    assert scored == [tmp_path / "many" / "a"]


def test_folders_are_checked_before_anything_is_scored(make_trial: MakeTrial, shared: Path, tmp_path: Path) -> None:
    good = saved(make_trial, shared, tmp_path / "good", "lora")
    base = loaded(make_trial, shared)
    save_changed(base.model, ["lm_head.weight"], tmp_path / "changed", identity="base")
    save_model(base.model, base.tokenizer, tmp_path / "whole")
    folders = {
        "good": good,
        "changed": tmp_path / "changed",
        "whole": tmp_path / "whole",
        "absent": tmp_path / "absent",
        "../out": good,
    }
    with pytest.raises(InputError) as caught:
        evaluate_adapters(base.model, base.tokenizer, folders, TASKS, cache=shared, output=tmp_path / "many")
    text = str(caught.value)
    assert "changed weights of a base, not an adapter" in text
    assert "a whole model, not an adapter" in text
    assert "no such folder" in text and "'../out'" in text
    assert len(caught.value.problems) == 4
    assert not (tmp_path / "many").exists()


def test_a_base_with_adapters_is_refused(make_trial: MakeTrial, shared: Path, tmp_path: Path) -> None:
    folder = saved(make_trial, shared, tmp_path / "saved", "lora")
    base = loaded(make_trial, shared)
    model = load_adapter(base.model, folder)
    for carrier in (model, base.model):
        with pytest.raises(ValueError, match="carries adapters already"):
            evaluate_adapters(carrier, base.tokenizer, {"a": folder}, TASKS, cache=shared, output=tmp_path / "many")


def test_an_unfrozen_model_of_transformers_own(make_trial: MakeTrial, shared: Path, tmp_path: Path) -> None:
    """The base need not come from the lab's loader."""
    folder = saved(make_trial, shared, tmp_path / "saved", "lora")
    base = loaded(make_trial, shared)
    model = AutoModelForCausalLM.from_pretrained(base.facts["model_folder"])
    scores = evaluate_adapters(model, base.tokenizer, {"a": folder}, TASKS, cache=shared, output=tmp_path / "many")
    alone = score_alone(base, folder, shared, tmp_path / "alone")
    assert scores["a"].metrics == alone.metrics
    assert all(parameter.requires_grad for parameter in model.parameters())
