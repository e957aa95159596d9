"""Routing at evaluation: numbers of a loop over single sequences, a control that can tell, a model left as it was."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from lora_lab.adapters.lora_experts import LoraExpertsConfig
from lora_lab.adapters.routing import RoutingLog, set_routing_log
from lora_lab.data.encode import Encoded
from lora_lab.data.rows import Row
from lora_lab.evaluate import routing
from lora_lab.evaluate.routing import routing_summary, write_routing
from lora_lab.evaluate.score import score_model
from lora_lab.models.random import SPECIAL_IDS, byte_tokenizer, random_network
from tests.conftest import MakeTrial
from tests.evaluation_samples import TINY_SHAPE, evaluation

EXPERTS = 4
UP = "model.layers.0.mlp.up_proj"
TOKENIZER = byte_tokenizer(TINY_SHAPE.max_positions)


def mixture(*, top_k: int | None = 2, seed: int = 0, family: str = "llama", targets: Sequence[str] = ()) -> Any:
    """A random model with routers that prefer somebody, in training mode as after training."""
    shape = TINY_SHAPE.model_copy(update={"family": family, "num_kv_heads": 2 if family == "gpt2" else 1})
    config = LoraExpertsConfig(
        r=2,
        lora_alpha=4,
        num_experts=EXPERTS,
        top_k=top_k,
        router_init="kaiming",
        target_modules=list(targets) or ["q_proj", "up_proj"],
        lora_dropout=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(random_network(shape, seed=seed), config)
        for layer in routers(model).values():
            torch.nn.init.normal_(layer.lora_experts_router["default"], std=2.0)
            torch.nn.init.normal_(layer.lora_experts_B["default"], std=0.3)
    return model.train()


def routers(model: Any) -> dict[str, Any]:
    return {module.routing_name: module for module in model.modules() if hasattr(module, "routing_name")}


def rows_of(texts: Sequence[tuple[str | None, str]]) -> tuple[list[Encoded], list[Row]]:
    """Held-out rows: (skill, text)."""
    rows = [Row(None, text, source=str(place), skill=skill) for place, (skill, text) in enumerate(texts)]
    encoded = []
    for _, text in texts:
        ids = (SPECIAL_IDS["<bos>"], *text.encode())
        encoded.append(Encoded(ids, (False, *[True] * (len(ids) - 1)), cut=False))
    return encoded, rows


TEXTS = [("copy", "ab" * (1 + place)) for place in range(11)] + [
    ("add", f"{place}+1={place + 1}") for place in range(3)
]


def alone(model: Any, ids: Sequence[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Probabilities and weights [tokens, experts] by router of one sequence without padding, from the inputs of the
    layers: softmax of x W^T, and the two largest divided by their sum."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, layer in routers(model).items()
    ]
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    model.train()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in routers(model).items():
        logits = (inputs[name][0].double() @ layer.lora_experts_router["default"].detach().double().T).numpy()
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        kept = p >= np.sort(p, axis=1)[:, -2:-1]
        found[name] = (p, p * kept / (p * kept).sum(axis=1, keepdims=True))
    return found


def test_numbers_are_those_of_a_loop_over_single_sequences(tmp_path: Path) -> None:
    model = mixture()
    heldout, rows = rows_of(TEXTS)
    content = write_routing(model, TOKENIZER, heldout, rows, [], tmp_path)
    assert json.loads((tmp_path / "routing.json").read_text()) == content
    assert content["schema_version"] == 1
    assert [(one["label"], one["source"], one["trained"]) for one in content["labels"]] == [
        ("copy", "heldout", True),
        ("add", "heldout", True),
    ]
    for label in content["labels"]:
        chosen = [one for one, row in zip(heldout, rows, strict=True) if row.skill == label["label"]]
        single = [alone(model, one.input_ids) for one in chosen]
        assert label["sequences"] == len(chosen)
        assert label["tokens"] == sum(len(one.input_ids) for one in chosen)
        assert set(label["routers"]) == {"model.layers.0.self_attn.q_proj", UP}
        for name, told in label["routers"].items():
            p = np.concatenate([one[name][0] for one in single])
            weights = np.concatenate([one[name][1] for one in single])
            entropy = float(-(p * np.log(p)).sum(axis=1).mean())
            assert told["tokens"] == label["tokens"]
            assert told["entropy"] == pytest.approx(entropy, rel=1e-5)
            assert told["relative_entropy"] == pytest.approx(entropy / math.log(EXPERTS), rel=1e-5)
            assert told["load"] == pytest.approx(weights.mean(axis=0), rel=1e-5, abs=1e-6)
            assert told["chosen"] == pytest.approx((weights > 0).mean(axis=0), rel=1e-5)
            assert told["first"] == pytest.approx(np.eye(EXPERTS)[p.argmax(axis=1)].mean(axis=0), rel=1e-5)
            assert told["top2_mass"] == pytest.approx(np.sort(p, axis=1)[:, -2:].sum(axis=1).mean(), rel=1e-5)


def test_the_control_is_over_sequences_and_told_apart_by_what_was_trained_on(tmp_path: Path) -> None:
    """The statistic by hand from single sequences: variance between labels of mean probabilities, mean over experts."""
    model = mixture()
    heldout, rows = rows_of([*TEXTS, (None, "plain"), (None, "text")])
    document = {"doc_id": 0, "arguments": [["seven ", "eight"], ["seven ", "nine"]]}
    (tmp_path / "samples_odd.jsonl").write_text(json.dumps(document) + "\n")
    content = write_routing(model, TOKENIZER, heldout, rows, ["odd"], tmp_path)
    labels = [(one["label"], one["source"], one["trained"], one["sequences"]) for one in content["labels"]]
    assert labels[2:] == [("heldout", "heldout", True, 2), ("odd", "task", False, 1)]
    sequences = [one.input_ids for one in heldout] + [tuple(b"seven eight")]
    groups = np.array([0] * 11 + [1] * 3 + [2] * 2 + [3])
    means = np.array([np.concatenate([p.mean(axis=0) for p, _ in alone(model, ids).values()]) for ids in sequences])
    for side, known in (("trained", groups < 3), ("all", groups < 4)):
        table, of = means[known], groups[known]
        between = sum((of == g).mean() * (table[of == g].mean(axis=0) - table.mean(axis=0)) ** 2 for g in set(of))
        told = content["specialization"][side]
        assert told["statistic"] == pytest.approx(between.mean(), rel=1e-5)
        assert (told["permutations"], told["seed"]) == (999, 0)


def test_first_documents_of_a_task_with_their_first_continuation(tmp_path: Path) -> None:
    lines = [{"doc_id": 0, "arguments": [["", "abc"]]}, {"doc_id": 0, "arguments": [["", "not again"]]}]
    lines += [{"doc_id": 1, "arguments": [["<bos>ask ", {"until": ["\n"]}]]}, {"doc_id": 2, "arguments": [["", ""]]}]
    lines += [{"doc_id": place, "arguments": [["x", "yz"]]} for place in range(3, 30)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    for task in ("skills_trained", "other"):
        (tmp_path / f"samples_{task}.jsonl").write_text(text)
    content = write_routing(mixture(), TOKENIZER, [], [], ["other", "group", "skills_trained"], tmp_path)
    assert [(one["label"], one["trained"]) for one in content["labels"]] == [("other", False), ("skills_trained", True)]
    for label in content["labels"]:
        assert label["sequences"] == 15, "the first sixteen documents; one of them is empty"
        assert label["tokens"] == 3 + 5 + 13 * 3, "a BOS that the text brings along is one token, and none is added"
    assert content["specialization"]["trained"] is None, "one label cannot be told apart from another"
    assert content["specialization"]["all"] is not None


def test_a_text_keeps_its_end_within_the_models_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TOKENS", 8)
    long = "x" * 30 + "the end"
    for name, text in (("whole", long), ("end", long[-8:])):
        (tmp_path / f"samples_{name}.jsonl").write_text(json.dumps({"doc_id": 0, "arguments": [[text]]}) + "\n")
    whole, end = write_routing(mixture(), TOKENIZER, [], [], ["whole", "end"], tmp_path)["labels"]
    assert whole["tokens"] == 8 and whole["routers"] == end["routers"]


def by_first_letter(model: Any) -> Any:
    """The first layer's router sees the sign of one feature, by which embeddings of even and odd bytes differ."""
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[:, 0] = torch.where(torch.arange(len(weight)) % 2 == 0, 4.0, -4.0)
        for layer in routers(model).values():
            layer.lora_experts_router["default"].zero_()
        layer.lora_experts_router["default"][0, 0] = 3.0
    return model


def texts_of(letters: dict[str, str], seed: int) -> list[tuple[str | None, str]]:
    draw = random.Random(seed)
    return [
        (skill, "".join(draw.choices(chosen, k=draw.randint(3, 9))))
        for skill, chosen in letters.items()
        for _ in "x" * 10
    ]


def p_value(model: Any, letters: dict[str, str], folder: Path, *, seed: int = 0) -> float:
    content = write_routing(model, TOKENIZER, *rows_of(texts_of(letters, seed)), [], folder)
    value: float = content["specialization"]["trained"]["p_value"]
    return value


def test_routing_that_follows_the_label_by_construction_is_told_from_chance(tmp_path: Path) -> None:
    model = by_first_letter(mixture(targets=["q_proj"]))
    assert p_value(model, {"even": "bdfhj", "odd": "acegi"}, tmp_path) <= 0.005
    same = [p_value(model, {"one": "abcdef", "two": "abcdef"}, tmp_path, seed=seed) for seed in range(12)]
    assert sum(p < 0.05 for p in same) <= 2 and sum(same) / 12 > 0.3, "labels of nothing: p is spread over 0..1"


def test_constant_routing_follows_nothing(tmp_path: Path) -> None:
    model = mixture(top_k=None)
    with torch.no_grad():
        for layer in routers(model).values():
            layer.lora_experts_router["default"].zero_()
    assert p_value(model, {"even": "bdfhj", "odd": "acegi"}, tmp_path) == 1.0


def test_the_summary_is_the_mean_over_routers() -> None:
    router = {"relative_entropy": 0.5, "top2_mass": 0.75}
    single = {"relative_entropy": None, "top2_mass": 1.0}
    label = {"label": "copy", "source": "heldout", "trained": True, "routers": {"a": router, "b": single}}
    other = {"label": "odd", "source": "task", "trained": False, "routers": {"b": single}}
    content = {"labels": [label, other], "specialization": {"trained": None, "all": {"p_value": 0.25}}}
    assert routing_summary(content) == {
        "labels": {
            "heldout/copy": {"trained": True, "relative_entropy": 0.5, "top2_mass": 0.875},
            "task/odd": {"trained": False, "relative_entropy": None, "top2_mass": 1.0},
        },
        "p_value": {"trained": None, "all": 0.25},
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was(tmp_path: Path, family: str) -> None:
    model = mixture(family=family, targets=["c_attn", "c_fc"] if family == "gpt2" else ())
    model.get_base_model().get_output_embeddings().eval()
    own = RoutingLog()
    set_routing_log(model, own, "default")
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    write_routing(model, TOKENIZER, *rows_of(TEXTS), [], tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert all(layer.routing_log is own for layer in routers(model).values())
    assert own.entries == {} and not own.is_open
    assert {layer.routing_adapter for layer in routers(model).values()} == {"default"}


def test_an_adapter_without_a_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no layer of adapter "another" has a router'):
        write_routing(mixture(), TOKENIZER, *rows_of(TEXTS), [], tmp_path, adapter_name="another")


def test_scores_are_the_same_with_and_without(make_trial: MakeTrial, tmp_path: Path) -> None:
    heldout, rows = rows_of(TEXTS)
    wanted = evaluation("skills_trained", "skills_unseen", heldout=True)
    found = {}
    for kind in ("molora", "lora"):
        trial = make_trial(f"method={kind}").model_copy(update={"evaluation": wanted})
        output = tmp_path / kind
        found[kind] = score_model(
            mixture(),
            TOKENIZER,
            heldout,
            rows,
            trial,
            cache=tmp_path / "cache",
            output=output,
            progress=lambda _read, _total: None,
        )
        assert (output / "routing.json").is_file() == (kind == "molora")
    assert found["molora"].metrics == found["lora"].metrics
    assert "routing" not in found["lora"].facts
    told = found["molora"].facts["routing"]["labels"]
    assert {name: one["trained"] for name, one in told.items()} == {
        "heldout/copy": True,
        "heldout/add": True,
        "task/skills_trained": True,
        "task/skills_unseen": False,
    }
