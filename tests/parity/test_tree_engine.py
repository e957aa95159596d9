"""The tree engine against lm-eval's own HFLM: every request, whatever the set, the family and the method."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, GemmaConfig

from lora_lab.errors import EvaluationError
from lora_lab.evaluate import lab_model
from lora_lab.evaluate.guard_note import GuardNote
from lora_lab.evaluate.lab_model import LabModel
from lora_lab.evaluate.tree import forward, support
from lora_lab.models.random import byte_tokenizer
from tests.conftest import MakeTrial
from tests.contract.test_every_method import ROWS, trained, trial_of
from tests.parity.test_prompts import network
from tests.tiers import mostly_slow

pytestmark = pytest.mark.usefixtures("one_core")

LIMIT = 64
FAMILIES = ("llama", "gpt2", "qwen2", "mistral", "gemma")
Texts = list[tuple[str, str]]


def shuffled() -> Texts:
    """Four questions behind one header, answers of one or more tokens that share beginnings, in no order."""
    header = "Q: one and one? A: two\n"
    questions = [f"{header}Q: {text}? A:" for text in ("why", "who is it", "who was it", "where")]
    texts = [(question, answer) for question in questions for answer in (" a", " an", " another", " b", " no one")]
    random.Random(0).shuffle(texts)
    return texts


# Sets that a tree may stumble over, by name.
SETS: dict[str, Texts] = {
    "questions": shuffled(),
    "one": [("The cat", " sat")],
    "identical": [("The cat", " sat")] * 9,
    "nothing shared": [(chr(97 + place) * 5, f" {place}") for place in range(20)],
    "one in the other": [("a" * length, "a" * more) for length in range(1, 12) for more in (1, 3)],
    "too long": [("x" * 80 + tail, " end" + more) for tail in ("", "a", "ab") for more in ("", "ing")],
    "as long as it gets": [("y" * (LIMIT - 3), "abcd"), ("y" * (LIMIT - 4), "abcd"), ("y", "z" * LIMIT)],
    "no context": [("", "word"), ("", "world"), ("", "w"), ("wo", "rd")],
    "spaces": [("The cat ", "sat"), ("The cat", " sat"), ("The cat  ", " sat"), ("The\n", "\ncat")],
    "unicode": [("Größe: ", "naïve"), ("日本", "語"), ("日", "本語"), ("🙂🙃", "🙂"), ("e\u0301", "é")],
    "marks": [("<bos>The", " cat"), ("<bos>", "The"), ("a<eos>", "b<turn>")],
}


def gemma() -> Any:
    """A random Gemma, one head of keys and values, its weights as large as those of `network`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=260, num_hidden_layers=2, head_dim=8, max_position_embeddings=LIMIT, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A random model of each family."""
    return {name: gemma() if name == "gemma" else network(name, dtype=torch.float32) for name in FAMILIES}


def asked(texts: Sequence[tuple[Any, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, one, index, (f"task {index % 3}", index, 1)) for index, one in enumerate(texts)]


def stock(model: Any, *, batch_size: int = 4, logits_cache: bool = False) -> HFLM:
    settings = {"backend": "causal", "batch_size": batch_size, "logits_cache": logits_cache}
    return HFLM(pretrained=model, tokenizer=byte_tokenizer(LIMIT), **settings)


def lab(model: Any, **settings: Any) -> LabModel:
    return LabModel(model, tokenizer=byte_tokenizer(LIMIT), **{"batch_size": 4, "guard": False, **settings})


def compare(model: Any, texts: Texts, *, within: float = 1e-4, **settings: Any) -> LabModel:
    """Both engines on `texts`: log-likelihoods within a tolerance, greedy the same. Returns the lab's model."""
    expected = stock(model).loglikelihood(asked(texts), disable_tqdm=True)
    ours = lab(model, **settings)
    found = ours.loglikelihood(asked(texts))
    for text, (value, greedy), (theirs, their_greedy) in zip(texts, found, expected, strict=True):
        assert value == pytest.approx(theirs, abs=within, rel=1e-6), text
        assert greedy == their_greedy, text
    return ours


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_requests(models: dict[str, Any], family: str, name: str) -> None:
    ours = compare(models[family], SETS[name])
    assert ours.engine_facts[0]["engine"] == "tree"


def test_where_lm_eval_shares_logits(models: dict[str, Any]) -> None:
    """lm-eval computes requests with equal inputs once (`logits_cache`) and then reads a shorter continuation's
    log-probabilities at the start of a longer one's. We score what lm-eval scores without that shortcut; when this
    test fails because both agree, lm-eval has mended it, and the note in lab_model.py can go."""
    pair = [("ab", "cd"), ("abc", "d")]
    requests = asked(pair)
    (_, right), (_, shared), (_, ours) = (
        one.loglikelihood(requests, disable_tqdm=True)
        for one in (
            stock(models["llama"]),
            stock(models["llama"], logits_cache=True),
            lab(models["llama"]),
        )
    )
    assert ours[0] == pytest.approx(right[0], abs=1e-5)
    assert shared[0] != pytest.approx(right[0], abs=1e-2)


def test_the_sets_do_what_they_say(models: dict[str, Any]) -> None:
    """Cut contexts are counted, what is shared is shared, and what is not goes flat."""
    facts = {name: compare(models["llama"], texts) for name, texts in SETS.items()}
    assert facts["too long"].truncated_requests == 6
    counts = {name: ours.engine_facts[0] for name, ours in facts.items()}
    assert counts["nothing shared"]["is_flat"] and not counts["questions"]["is_flat"]
    assert counts["identical"]["distinct"] == 1 and counts["identical"]["computed_tokens"] == len("The cat sat") - 1
    # The header, four endings behind it (two share "who "), and of the answers what comes before the last token.
    header, endings, answers = 23, len("why? A:where? A:who is it? A:who was it? A:") - len("Q: who "), 4 * 14
    assert counts["questions"]["nodes"] == pytest.approx(header + endings + answers, abs=20)
    assert counts["questions"]["nodes"] * 4 < counts["questions"]["flat_tokens"]


def brute_force_nodes(texts: Texts) -> int:
    """Distinct prefixes of all inputs."""
    inputs = {tuple((context + target).encode())[:-1] for context, target in texts}
    return len({tokens[: end + 1] for tokens in inputs for end in range(len(tokens))})


def test_every_shared_token_is_computed_once(models: dict[str, Any]) -> None:
    ours = compare(models["llama"], SETS["questions"], chunk_tokens=4096)
    facts = ours.engine_facts[0]
    assert facts["nodes"] == brute_force_nodes(SETS["questions"])
    read: list[int] = []
    hook = models["llama"].get_input_embeddings().register_forward_hook(lambda _m, ids, _o: read.append(ids[0].numel()))
    lab(models["llama"], chunk_tokens=4096).loglikelihood(asked(SETS["questions"]))
    hook.remove()
    assert sum(read[-facts["passes"] :]) == facts["padded_tokens"]


@pytest.mark.parametrize("family", mostly_slow(["llama", "gpt2"], keep=["llama"]))
def test_ten_thousand_requests(models: dict[str, Any], family: str) -> None:
    """As many as a benchmark has, of all lengths; a sample is compared."""
    draw = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "x", "yy"]
    texts = [
        (" ".join(draw.choices(words, k=draw.randint(1, 6))), " " + draw.choice(words) * draw.randint(1, 2))
        for _ in range(10_000)
    ]
    found = lab(models[family]).loglikelihood(asked(texts))
    places = draw.sample(range(len(texts)), 200)
    expected = stock(models[family], batch_size=64).loglikelihood(
        asked([texts[place] for place in places]), disable_tqdm=True
    )
    for place, (value, greedy) in zip(places, expected, strict=True):
        assert found[place][0] == pytest.approx(value, abs=1e-4, rel=1e-6)
        assert found[place][1] == greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling(models: dict[str, Any], family: str) -> None:
    """Texts of less than one window, of one, and of several."""
    texts = [("a",), ("a short one",), ("z" * LIMIT,), ("".join(chr(97 + n % 26) for n in range(150)),), ("日本語🙂",)]
    requests = asked(texts, "loglikelihood_rolling")
    expected = stock(models[family]).loglikelihood_rolling(requests, disable_tqdm=True)
    ours = lab(models[family])
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=2e-4, rel=1e-6)
    assert ours.engine_facts[0] | {"kind": "loglikelihood_rolling", "engine": "tree"} == ours.engine_facts[0]


def test_the_same_requests_give_the_same_bits(models: dict[str, Any]) -> None:
    """In another order, some twice, and on a fresh object."""
    texts = SETS["questions"] + SETS["unicode"] + SETS["no context"]
    first = dict(zip(texts, lab(models["llama"]).loglikelihood(asked(texts)), strict=True))
    again = [*reversed(texts), texts[0]]
    assert lab(network("llama", dtype=torch.float32)).loglikelihood(asked(again)) == [first[text] for text in again]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 33, 256, 100_000])
def test_the_budget_moves_rounding_only(models: dict[str, Any], chunk_tokens: int) -> None:
    texts = [text for name in ("questions", "one in the other", "unicode", "too long") for text in SETS[name]]
    ours = compare(models["qwen2"], texts, chunk_tokens=chunk_tokens)
    assert ours.engine_facts[0]["chunk_tokens"] == chunk_tokens


def test_stock_is_lm_evals_own(models: dict[str, Any]) -> None:
    texts = SETS["questions"] + SETS["too long"]
    ours = lab(models["gpt2"], engine="stock")
    expected = stock(models["gpt2"], logits_cache=True).loglikelihood(asked(texts), disable_tqdm=True)
    assert ours.loglikelihood(asked(texts)) == expected
    assert ours.engine_facts == [{"kind": "loglikelihood", "engine": "stock"}]


def test_a_base_is_compared_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a note, later objects neither ask lm-eval's engine nor probe; without one, each object compares."""
    note = GuardNote(tmp_path, {"base": "random"})
    texts = asked(SETS["questions"])

    def facts(note: GuardNote | None) -> dict[str, Any]:
        ours = lab(network("llama", dtype=torch.float32), guard=True, guard_note=note)
        ours.loglikelihood(texts)
        return ours.engine_facts[0]

    first = facts(note)
    assert not first["guard_remembered"] and first["guard"]["requests"] == len(texts)
    monkeypatch.setattr(lab_model, "check_against_stock", lambda *_, **__: pytest.fail("compared again"))
    monkeypatch.setattr(support, "why_probe_fails", lambda *_, **__: pytest.fail("probed again"))
    assert facts(note) == first | {"guard_remembered": True}
    with pytest.raises(pytest.fail.Exception, match="probed again"):
        facts(GuardNote(tmp_path, {"base": "another"}))
    monkeypatch.setattr(support, "why_probe_fails", lambda *_, **__: None)
    with pytest.raises(pytest.fail.Exception, match="compared again"):
        facts(None)


def test_a_wrong_tree_is_an_error(monkeypatch: pytest.MonkeyPatch, models: dict[str, Any]) -> None:
    """Every token sees the whole row, and the probe is blind: the guard shows the request."""
    monkeypatch.setattr(support, "why_probe_fails", lambda *_, **__: None)
    right = forward.TreeForward._mask
    monkeypatch.setattr(forward.TreeForward, "_mask", lambda self, ids: right(self, ids) * 0)
    with pytest.raises(EvaluationError, match=r"lm-eval's own engine .* request: 'Q: one and one"):
        lab(network("llama", dtype=torch.float32), guard=True).loglikelihood(asked(SETS["questions"]))


def test_a_model_that_no_tree_fits_is_lm_evals(tmp_path: Path) -> None:
    """A window of 6 tokens: the same scores as lm-eval's, and the reason."""
    model = network("windowed", dtype=torch.float32)
    ours = lab(model, guard=True, guard_note=GuardNote(tmp_path, {}))
    texts = SETS["questions"]
    assert ours.loglikelihood(asked(texts)) == stock(model, logits_cache=True).loglikelihood(
        asked(texts), disable_tqdm=True
    )
    rolling = asked([(text,) for text, _ in texts], "loglikelihood_rolling")
    assert ours.loglikelihood_rolling(rolling) == stock(model).loglikelihood_rolling(rolling, disable_tqdm=True)
    for facts in ours.engine_facts:
        assert facts["engine"] == "stock" and "sliding_window of 6" in facts["why_stock"]


@pytest.mark.parametrize("method", ROWS)
def test_methods(make_trial: MakeTrial, shared: Path, method: str) -> None:
    """A trained adapter of every method; the guard compares with lm-eval on the way."""
    _, attached, _ = trained(trial_of(make_trial, method, "llama"), shared)
    model = attached.model.eval()
    ours = LabModel(model, tokenizer=byte_tokenizer(256), batch_size=4)
    texts = SETS["questions"] + SETS["unicode"] + SETS["no context"]
    found = ours.loglikelihood(asked(texts))
    theirs = LabModel(model, tokenizer=byte_tokenizer(256), batch_size=4, engine="stock", logits_cache=False)
    theirs = theirs.loglikelihood(asked(texts))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in theirs], abs=1e-4, rel=1e-6)
    facts = ours.engine_facts[0]
    assert facts["engine"] == "tree", facts
    assert facts["guard"]["requests"] == len(texts) and facts["guard"]["allowance"]["rounding"] == 0.0
    settings = {"until": ["\n"], "max_gen_toks": 12}
    prompts = asked([(context, settings) for context in dict(SETS["questions"])], "generate_until")
    lm_evals = LabModel(model, tokenizer=byte_tokenizer(256), batch_size=4, engine="stock").generate_until(prompts)
    assert ours.generate_until(prompts) == lm_evals
    assert ours.engine_facts[1]["engine"] == "greedy" or method == "prefix_tuning", ours.engine_facts[1]


NARROW = [
    (method, change)
    for method, row in ROWS.items()
    for change in ("training.precision=bf16", "quantization=nf4", "quantization=int8")
    if row.quantized
]


@pytest.mark.parametrize(
    "narrow",
    mostly_slow(
        NARROW,
        keep=[
            ("lora", "training.precision=bf16"),
            ("mola", "training.precision=bf16"),
            ("dora", "quantization=nf4"),
            ("prefix_tuning", "quantization=nf4"),
            ("ia3", "quantization=int8"),
        ],
    ),
    ids=" ".join,
)
def test_narrow_numbers(make_trial: MakeTrial, shared: Path, narrow: tuple[str, str]) -> None:
    """bf16 and quantized bases: within three times what lm-eval's own scores move by, which the guard measures."""
    if narrow == ("adalora", "quantization=int8"):
        pytest.skip("PEFT has no AdaLoRA on int8 of this kind")
    _, attached, _ = trained(trial_of(make_trial, narrow[0], "llama", narrow[1]), shared)
    ours = LabModel(attached.model.eval(), tokenizer=byte_tokenizer(256), batch_size=4)
    ours.loglikelihood(asked(SETS["questions"] + SETS["unicode"]))
    facts = ours.engine_facts[0]
    assert facts["engine"] == "tree", facts
    assert facts["guard"]["largest_share"] <= 1 and facts["guard"]["allowance"]["spread"] >= 0
