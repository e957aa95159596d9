"""Remembered scores: the same in every part of the key gives the same floats back; one part changed is a miss."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model

from lora_lab.errors import EvaluationError
from lora_lab.evaluate import remembering
from lora_lab.evaluate.harness import Scores, evaluate_model
from lora_lab.evaluate.remembering import RememberingModel, tokenizer_digest
from lora_lab.evaluate.score_cache import ScoreCache, requests_digest
from lora_lab.models.random import byte_tokenizer, random_network
from lora_lab.schema.evaluation import Evaluation
from tests.evaluation_samples import TINY_SHAPE, evaluation
from tests.tuner_bases import quantized, run_python, shaken

SHAPE = TINY_SHAPE.model_copy(update={"max_positions": 512})
AWKWARD = [-0.1, -1 / 3, -5e-324, -1.7976931348623157e308, -0.0, -math.pi * 1e-7]


def pair(context: str, target: str, task: str = "demo", document: int = 0) -> Instance:
    return Instance("loglikelihood", {}, (context, target), 0, (task, document, 1))


def generation(context: str, task: str = "demo", **settings: Any) -> Instance:
    return Instance("generate_until", {}, (context, settings), 0, (task, 0, 1))


PAIRS = [pair(f"a{index}", f" b{index}", document=index) for index in range(len(AWKWARD))]
FACTS = {"weights": "abc", "limit": None}


class Counting:
    """A call that says how often it was made."""

    def __init__(self, values: list[Any]) -> None:
        self.values, self.calls = values, 0

    def __call__(self) -> tuple[list[Any], dict[str, Any]]:
        self.calls += 1
        return self.values, {"cut": 3}


def scores_of(values: list[float]) -> list[tuple[float, bool]]:
    return [(value, index % 2 == 0) for index, value in enumerate(values)]


def test_floats_come_back_to_the_last_bit(tmp_path: Path) -> None:
    call = Counting(scores_of(AWKWARD))
    first = ScoreCache(tmp_path).answers("loglikelihood", PAIRS, FACTS, call)
    second = ScoreCache(tmp_path).answers("loglikelihood", PAIRS, FACTS, call)
    assert (first.from_cache, second.from_cache, call.calls) == (False, True, 1)
    assert first.key == second.key and (tmp_path / f"{first.key}.json").is_file()
    assert [(value.hex(), greedy) for value, greedy in second.values] == [
        (value.hex(), greedy) for value, greedy in scores_of(AWKWARD)
    ]
    assert second.values == first.values == scores_of(AWKWARD)
    assert second.notes == {"cut": 3}


def test_other_kinds_of_answers(tmp_path: Path) -> None:
    store = ScoreCache(tmp_path)
    rolling = [Instance("loglikelihood_rolling", {}, ("text",), 0, ("demo", 0, 1))]
    exact = np.float64(-12.345678901234567)
    for _ in range(2):
        assert store.answers("loglikelihood_rolling", rolling, FACTS, lambda: ([exact], {})).values == [float(exact)]
    texts = ["plain", "", "\n\u2028", "\U0001f600", "broken \ud800 half", 'quote " and \\']
    asked = [generation(f"q{index}", until=["\n"]) for index in range(len(texts))]
    for _ in range(2):
        found = store.answers("generate_until", asked, FACTS, lambda: (texts, {}))
        assert found.values == texts
    assert found.from_cache


REQUESTS: dict[str, list[Instance]] = {
    "another context": [pair("x", " b"), pair("c", " d")],
    "another target": [pair("a", " x"), pair("c", " d")],
    "a space elsewhere": [pair("a ", "b"), pair("c", " d")],
    "another order": [pair("c", " d"), pair("a", " b")],
    "one less": [pair("a", " b")],
    "one twice": [pair("a", " b"), pair("c", " d"), pair("c", " d")],
    "another task": [pair("a", " b", "other"), pair("c", " d", "other")],
    "arguments run together": [pair("a", ' b","c'), pair("", " d")],
    "token ids": [Instance("loglikelihood", {}, ("a", " b", [1, 2]), 0, ("demo", 0, 1)), pair("c", " d")],
    "other token ids": [Instance("loglikelihood", {}, ("a", " b", [1, 3]), 0, ("demo", 0, 1)), pair("c", " d")],
    "nothing": [],
}


def test_requests_have_digests_of_their_own() -> None:
    plain = [pair("a", " b"), pair("c", " d")]
    digests = {name: requests_digest(requests) for name, requests in REQUESTS.items()} | {"": requests_digest(plain)}
    assert len(set(digests.values())) == len(REQUESTS) + 1
    assert requests_digest([pair("a", " b"), pair("c", " d", document=7)]) == digests[""]


def test_settings_of_generation_are_in_the_key() -> None:
    asked: list[dict[str, Any]] = [{"until": ["\n"]}, {"until": []}, {"until": ["\n"], "max_gen_toks": 3}]
    digests = [requests_digest([generation("q", **settings)]) for settings in asked]
    assert len(set(digests)) == len(asked)
    same = [{"max_gen_toks": 3, "do_sample": False}, {"do_sample": False, "max_gen_toks": 3}]
    assert len({requests_digest([generation("q", **settings)]) for settings in same}) == 1


def test_facts_and_the_kind_of_request_are_in_the_key(tmp_path: Path) -> None:
    store, asked = ScoreCache(tmp_path), [pair("a", " b")]
    call = Counting([(-1.0, True)])
    facts: list[Mapping[str, Any]] = [FACTS, {**FACTS, "limit": 1}, {**FACTS, "weights": "abd"}, {"weights": "abc"}]
    keys = {store.answers("loglikelihood", asked, one, call).key for one in facts}
    keys.add(store.answers("loglikelihood_rolling", asked, FACTS, lambda: ([-1.0], {})).key)
    assert len(keys) == 5 and call.calls == 4


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "scores",
    "another JSON": lambda text: "[1, 2, 3]",
    "null": lambda text: "null",
    "one digit": lambda text: text.replace("0.333", "0.334"),
    "a boolean": lambda text: text.replace("false", "true", 1),
    "an answer less": lambda text: json.dumps({**json.loads(text), "answers": json.loads(text)["answers"][1:]}),
    "other facts": lambda text: text.replace('"abc"', '"xyz"'),
    "a later version": lambda text: json.dumps({**json.loads(text), "schema_version": 2}),
    "NaN": lambda text: text.replace("-0.1", "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_written_anew(tmp_path: Path, damage: str) -> None:
    store, call = ScoreCache(tmp_path), Counting(scores_of(AWKWARD))
    path = tmp_path / f"{store.answers('loglikelihood', PAIRS, FACTS, call).key}.json"
    whole = path.read_text()
    path.write_text(DAMAGE[damage](whole))
    assert path.read_text() != whole
    found = store.answers("loglikelihood", PAIRS, FACTS, call)
    assert (found.from_cache, call.calls, found.values) == (False, 2, scores_of(AWKWARD))
    assert path.read_text() == whole
    assert store.answers("loglikelihood", PAIRS, FACTS, call).from_cache


def test_bytes_that_are_no_text_are_a_miss(tmp_path: Path) -> None:
    store, call = ScoreCache(tmp_path), Counting(scores_of(AWKWARD))
    path = tmp_path / f"{store.answers('loglikelihood', PAIRS, FACTS, call).key}.json"
    path.write_bytes(os.urandom(200))
    assert not store.answers("loglikelihood", PAIRS, FACTS, call).from_cache


def test_the_file_is_readable_and_says_what_it_is(tmp_path: Path) -> None:
    found = ScoreCache(tmp_path).answers("loglikelihood", PAIRS, FACTS, Counting(scores_of(AWKWARD)))
    assert [path.name for path in tmp_path.iterdir()] == [f"{found.key}.json"]
    content = json.loads((tmp_path / f"{found.key}.json").read_text())
    assert content["facts"] == FACTS and content["request_type"] == "loglikelihood"
    assert (content["schema_version"], content["requests"]) == (1, len(PAIRS))


def test_what_must_not_be_kept_is_not(tmp_path: Path) -> None:
    store, asked = ScoreCache(tmp_path), [pair("a", " b")]
    for value in (math.nan, -math.inf):
        found = store.answers("loglikelihood", asked, FACTS, Counting([(value, True)]))
        assert repr(found.values[0][0]) == repr(value) and not found.from_cache

    def failing() -> Any:
        raise EvaluationError("a log-likelihood is nan")

    with pytest.raises(EvaluationError):
        store.answers("loglikelihood", asked, FACTS, failing)
    with pytest.raises(ValueError, match="1 requests have 2 answers"):
        store.answers("loglikelihood", asked, FACTS, Counting([(-1.0, True), (-2.0, True)]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no part of a key"):
        store.answers("loglikelihood", asked, {"weights": object()}, failing)
    with pytest.raises(ValueError, match="request_type"):
        store.answers("multiple_choice", asked, FACTS, failing)  # type: ignore[arg-type]


# What follows goes through the model: which of its facts are in the key.


def network(seed: int = 0) -> Any:
    return random_network(SHAPE, seed)


def adapted(amount: float, alpha: int = 4) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return shaken(get_peft_model(network(), config), amount)


class Task:
    """As much of lm-eval's as the key reads."""

    def __init__(self, version: object = 1, num_fewshot: int = 0) -> None:
        self.VERSION, self._num_fewshot = version, num_fewshot

    def get_config(self, key: str) -> int:
        assert key == "num_fewshot"
        return self._num_fewshot


def remembering_model(
    folder: Path | None, model: Any = None, tokenizer: Any = None, **changes: Any
) -> RememberingModel:
    settings: dict[str, Any] = {"batch_size": 2, "engine": "stock", "about": {"limit": None}} | changes
    settings.setdefault("applies_chat_template", False)
    tasks = settings.pop("tasks", {"demo": Task()})
    tokenizer = byte_tokenizer(512) if tokenizer is None else tokenizer
    made = RememberingModel(network() if model is None else model, tokenizer=tokenizer, remember_in=folder, **settings)
    made.note_tasks(tasks)
    return made


def key_of(model: RememberingModel, requests: list[Instance] = PAIRS[:2]) -> str:
    model.loglikelihood(requests)
    facts = model.score_cache_facts
    assert facts is not None
    return str(facts["keys"]["loglikelihood"])


def hinted(tokenizer: Any, **settings: Any) -> Any:
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


# One component of the key each.
CHANGES: dict[str, Callable[[Path], RememberingModel]] = {
    "weights": lambda folder: remembering_model(folder, network(1)),
    "an adapter": lambda folder: remembering_model(folder, adapted(0.1)),
    "another adapter": lambda folder: remembering_model(folder, adapted(0.2)),
    "another alpha": lambda folder: remembering_model(folder, adapted(0.1, alpha=8)),
    "dtype": lambda folder: remembering_model(folder, network().to(torch.bfloat16)),
    "batch size": lambda folder: remembering_model(folder, batch_size=3),
    "engine": lambda folder: remembering_model(folder, engine="tree"),
    "chunk tokens": lambda folder: remembering_model(folder, chunk_tokens=64),
    "max length": lambda folder: remembering_model(folder, max_length=128),
    "logits cache": lambda folder: remembering_model(folder, logits_cache=False),
    "softmax dtype": lambda folder: remembering_model(folder, softmax_dtype="float64"),
    "BOS": lambda folder: remembering_model(folder, add_bos_token=True),
    "prefix token": lambda folder: remembering_model(folder, prefix_token_id=5),
    "limit": lambda folder: remembering_model(folder, about={"limit": 7}),
    "task version": lambda folder: remembering_model(folder, tasks={"demo": Task(version=2)}),
    "examples": lambda folder: remembering_model(folder, tasks={"demo": Task(num_fewshot=5)}),
    "chat template": lambda folder: remembering_model(folder, applies_chat_template=True),
    "another chat template": lambda folder: remembering_model(
        folder, tokenizer=hinted(byte_tokenizer(512), chat_template="{{ messages }}"), applies_chat_template=True
    ),
    "pad token": lambda folder: remembering_model(folder, tokenizer=hinted(byte_tokenizer(512), pad_token="<eos>")),
    "padding side": lambda folder: remembering_model(
        folder, tokenizer=hinted(byte_tokenizer(512), padding_side="left")
    ),
}


def test_one_change_is_a_miss(tmp_path: Path) -> None:
    """Every change gives a key of its own, and with nothing changed it is a hit with the same floats."""
    first = remembering_model(tmp_path)
    values = first.loglikelihood(PAIRS[:2])
    keys = {"": key_of(remembering_model(tmp_path))}
    for name, make in CHANGES.items():
        model = make(tmp_path)
        keys[name] = key_of(model)
        assert model.score_cache_facts == {"hits": [], "keys": {"loglikelihood": keys[name]}}, name
    assert len(set(keys.values())) == len(keys), keys
    again = remembering_model(tmp_path)
    assert again.loglikelihood(PAIRS[:2]) == values
    assert again.score_cache_facts == {"hits": ["loglikelihood"], "keys": {"loglikelihood": keys[""]}}


def test_an_unapplied_chat_template_is_no_part_of_it(tmp_path: Path) -> None:
    key = key_of(remembering_model(tmp_path))
    other = remembering_model(tmp_path, tokenizer=hinted(byte_tokenizer(512), chat_template="{{ messages }}"))
    assert key_of(other) == key


def test_threads_are_no_part_of_it(tmp_path: Path) -> None:
    key, threads = key_of(remembering_model(tmp_path)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert key_of(remembering_model(tmp_path)) == key
    finally:
        torch.set_num_threads(threads)


def test_device_library_and_arithmetic_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key_of(remembering_model(tmp_path))]
    version = remembering.version
    for library in ("torch", "transformers", "peft", "lm_eval", "tokenizers"):
        with monkeypatch.context() as patched:
            patched.setattr(remembering, "version", lambda name, one=library: "9" if name == one else version(name))
            keys.append(key_of(remembering_model(tmp_path)))
    for name, value in (("NUMERICS_VERSION", -1), ("_device", lambda _device: "cuda NVIDIA A100")):
        with monkeypatch.context() as patched:
            patched.setattr(remembering, name, value)
            keys.append(key_of(remembering_model(tmp_path)))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        keys.append(key_of(remembering_model(tmp_path)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(set(keys)) == len(keys)


def test_quantization_is_in_it(tmp_path: Path) -> None:
    models = [quantized("llama", kind, torch.float32, tmp_path / kind) for kind in ("nf4", "int8")]
    facts = [remembering.model_facts(remembering_model(tmp_path / "scores", model)) for model in models]
    assert facts[0]["quantization"] != facts[1]["quantization"]
    assert all("bitsandbytes" in one["versions"] for one in facts)


def test_a_tokenizer_is_known_by_what_it_does() -> None:
    digest = tokenizer_digest(byte_tokenizer(512))
    used = byte_tokenizer(512)
    used(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(used) == digest == tokenizer_digest(byte_tokenizer(512))
    more = byte_tokenizer(512)
    more.add_tokens(["word"])
    assert tokenizer_digest(more) != digest
    assert tokenizer_digest(byte_tokenizer(256)) != digest


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    model = remembering_model(None)
    model.loglikelihood(PAIRS)
    assert model.score_cache_facts is None and not list(tmp_path.iterdir())


def test_a_task_that_was_not_noted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task was noted by the name of other"):
        remembering_model(tmp_path).loglikelihood([pair("a", " b", "other")])


TASKS = evaluation("skills_trained", "prose_perplexity", skills={"documents": 6, "seed": 0}, limit=3)


def scored(folder: Path, name: str, asked: Evaluation = TASKS, seed: int = 0) -> Scores:
    return evaluate_model(
        network(seed), byte_tokenizer(512), asked, cache=folder / "cache", output=folder / name, remember=True
    )


def test_through_the_harness_and_in_another_process(tmp_path: Path) -> None:
    """Metrics, samples and the count of cut requests are the same whether they were computed or looked up."""
    first, second = scored(tmp_path, "first"), scored(tmp_path, "second")
    kinds = ["loglikelihood", "loglikelihood_rolling"]
    assert first.facts["score_cache"]["hits"] == [] and sorted(second.facts["score_cache"]["hits"]) == kinds
    assert first.metrics == second.metrics and first.missing == second.missing
    assert first.facts["score_cache"]["keys"] == second.facts["score_cache"]["keys"]
    for path in (tmp_path / "first").glob("samples_*.jsonl"):
        assert path.read_text() == (tmp_path / "second" / path.name).read_text()
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.unit.test_score_cache import scored\n"
        "found = scored(Path(sys.argv[1]), 'third')\n"
        "print(sorted(found.facts['score_cache']['hits']), file=sys.stderr)\n"
        "assert sorted(found.facts['score_cache']['hits']) == ['loglikelihood', 'loglikelihood_rolling']"
    )
    run_python(code, str(tmp_path))
    for path in (tmp_path / "first").glob("samples_*.jsonl"):
        assert path.read_text() == (tmp_path / "third" / path.name).read_text()


def test_settings_of_the_evaluation_miss(tmp_path: Path) -> None:
    scored(tmp_path, "first")
    changed = {
        "limit": TASKS.model_copy(update={"limit": 2}),
        "batch size": TASKS.model_copy(update={"batch_size": 3}),
        "template": TASKS.model_copy(update={"apply_chat_template": True}),
    }
    for name, asked in changed.items():
        assert scored(tmp_path, name, asked).facts["score_cache"]["hits"] == [], name
    assert scored(tmp_path, "other weights", seed=1).facts["score_cache"]["hits"] == []


def test_another_task_beside_it_leaves_the_other_kind_of_request_alone(tmp_path: Path) -> None:
    scored(tmp_path, "first")
    alone = TASKS.model_copy(update={"tasks": ("prose_perplexity",)})
    assert scored(tmp_path, "second", alone).facts["score_cache"]["hits"] == ["loglikelihood_rolling"]


def test_cut_requests_are_counted_again(tmp_path: Path) -> None:
    long = [pair("a" * 600, " b")]
    counts = []
    for _ in range(2):
        model = remembering_model(tmp_path)
        model.loglikelihood(long)
        counts.append(model.truncated_requests)
    assert counts == [1, 1]


def test_generation_is_remembered(tmp_path: Path) -> None:
    asked = [generation("ab", until=["\n"], max_gen_toks=4)]
    first, second = remembering_model(tmp_path), remembering_model(tmp_path)
    assert first.generate_until(asked) == second.generate_until(asked)
    assert second.score_cache_facts is not None and second.score_cache_facts["hits"] == ["generate_until"]


def test_only_the_untouched_base_is_remembered_by_default(tmp_path: Path) -> None:
    found = evaluate_model(network(), byte_tokenizer(512), TASKS, cache=tmp_path / "cache", output=tmp_path / "out")
    assert found.facts["score_cache"] is None
    assert not (tmp_path / "cache" / "scores").exists()
