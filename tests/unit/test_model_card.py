"""The card beside saved weights: the hub can read its head, its code runs, its numbers are the record's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from markdown_it.token import Token
from scipy import stats

from lora_lab.errors import MachineError
from lora_lab.record.ledger import Ledger
from lora_lab.record.model_card import CARD_FILE, card_text, write_cards
from lora_lab.record.result import Result, Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.restore import Restorer
from lora_lab.schema.method import METHODS
from lora_lab.schema.trial import Trial
from tests.conftest import MakeTrial
from tests.contract.test_every_method import ROWS
from tests.journey.program import Lab, python, single_thread
from tests.tiers import SLOW
from tests.unit.ledger_samples import claim, loss, result_of

MACHINE: dict[str, Any] = {
    "cpu": "Some CPU",
    "cores": 4,
    "usable_cores": 2,
    "memory_bytes": 8 * 10**9,
    "gpu": None,
    "hostname": "secret-host",
    "python": "3.11.0",
    "packages": {"torch": "2.10.0", "bitsandbytes": None},
    "code": {"commit": "c0ffee", "dirty": True, "reason": None},
}
FACTS = {
    "device": "cpu",
    "model_folder": "lab/cache/models/tiny_random-0123456789ab",
    "warnings": ["something was cut"],
    "evaluation": {"lm_eval_version": "0.4.13", "batch_size": 16, "num_fewshot": {"skills_unseen": 2}},
}
METRICS = {
    "heldout/loss": loss(2.71828),
    "skills_unseen/acc": loss(0.5, higher_is_better=True, chance=0.25, standard_error=0.125, unit="fraction"),
    "skills_unseen/exact_match,strict-match": loss(0.0, higher_is_better=True, standard_error=0.0, unit="fraction"),
    "train/loss": loss(3.5, standard_error=None, num_examples=None),
}
# One of each form that is saved, and each kind of adapter that only the lab can load.
SOME = ("lora", "full", "freeze", "prompt_tuning", "bottleneck", "mov", "mola")
HOSTILE = (
    "x\n---\nlicense: mit\n# h `` ` <script>alert(1)</script> <!-- [a](https://evil.example) ![i](//evil.example) "
    "| cell | **b** _i_ ~~s~~ &amp; $x$ https://evil.example www.evil.example \x1b[31m \u202e {{x}} '\" \\ ```\n```"
)


@pytest.fixture(scope="module", params=[SOME, pytest.param(tuple(ROWS), marks=SLOW)], ids=["some", "every method"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab under the default names with runs of methods, on plain and on quantized bases, and stages."""
    methods: tuple[str, ...] = request.param
    root = tmp_path_factory.mktemp("user") / "lab"
    lab = Lab(root, root / "cache")
    rate = "learning_rate=0.1"
    calls = [(f"method={method}", *ROWS[method].settings, rate, "training.max_steps=4") for method in methods]
    calls += [("method=base",), ("method=qlora", rate)]
    if methods != SOME:
        calls.append(("quantization=int8", rate))
    with single_thread():
        for call in calls:
            _run(lab, *call)
        start = lab.find("lora-r8-qv-s0").run_id
        on_weights = (rate, f"init_from={start}", "init_as=weights")
        second = _run(lab, "method=dora", *on_weights)
        _run(lab, "method=dora", rate, f"init_from={second}")
        if methods == SOME:
            return lab
        frozen = _run(lab, "method=freeze", *ROWS["freeze"].settings, *on_weights)
        _run(lab, "method=mola", *ROWS["mola"].settings, rate, f"init_from={frozen}", "init_as=weights")
        whole = _run(lab, "method=galore", *ROWS["galore"].settings, *on_weights)
        _run(lab, "method=rslora", rate, f"init_from={whole}", "init_as=weights")
        tied = ("model.shape.tied_embeddings=true", "model.tie_embeddings=false", "data.heldout_size=4")
        _run(lab, "method=freeze", *ROWS["freeze"].settings, rate, *tied)
    return lab


def _run(lab: Lab, *overrides: str) -> str:
    """The id of the one run that this call adds."""
    before = {record.run_id for record in lab.runs()}
    answer = lab.run(*overrides)
    assert answer.code == 0, answer.err
    (new,) = {record.run_id for record in lab.runs()} - before
    return new


def _begun(tmp_path: Path, trial: Trial, name: str | None = None) -> RunFolder:
    folder = claim(Ledger(tmp_path / "lab"), trial.model_dump(mode="json"), name=name)
    assert folder is not None
    folder.close()
    return folder


def _result(folder: RunFolder, **changes: Any) -> Result:
    return result_of(folder, **{"metrics": METRICS, "facts": FACTS, **changes})


def _card(tmp_path: Path, trial: Trial, **changes: Any) -> str:
    folder = _begun(tmp_path, trial)
    return card_text(folder.adapter_folder, folder.header, _result(folder, **changes), MACHINE)


def _head(card: str) -> dict[str, Any]:
    head: dict[str, Any] = ModelCard(card).data.to_dict()
    return head


def _snippet(card: str) -> str:
    found = re.search(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_run_leaves_a_card_instead_of_pefts_form(trained: Lab) -> None:
    record = trained.find("lora-r8-qv-s0")
    card = (record.adapter_folder / CARD_FILE).read_text()
    assert "More Information Needed" not in card and str(trained.root.parent) not in card
    assert record.header is not None and record.result is not None
    metric = record.result.metrics["heldout/loss"]
    (scored,) = (row for row in _rows(card) if row[0] == "heldout/loss")
    assert float(scored[1].split(" ± ")[0]) == pytest.approx(metric.value, abs=0.01)
    assert scored[2] == str(metric.num_examples)
    for value in (record.run_id, record.header.fingerprint, record.header.identities["data"]):
        assert f"`{value}`" in card
    whole = trained.find("full-s0")
    assert _head((whole.model_folder / CARD_FILE).read_text())["library_name"] == "transformers"
    assert not list(trained.find("base").folder.rglob(CARD_FILE))


def test_the_code_of_every_card_runs_and_loads_what_was_scored(trained: Lab) -> None:
    """All in one fresh process, where the lab was called; the logits are those of the restored run."""
    records = [record for record in trained.runs() if record.name != "base"]
    ids = list(range(40, 60))
    told = f"print('\\nNORM', model(input_ids=torch.tensor([{ids}])).logits.detach().double().norm().item())"
    forms = {record.run_id: METHODS[record.trial["method"]["kind"]].saves for record in records}
    cards = [(record.saved_folder(forms[record.run_id]) / CARD_FILE).read_text() for record in records]
    trained_kinds = {record.trial["method"]["kind"] for record in records}
    assert trained_kinds in ({*SOME, "dora"}, set(METHODS) - {"base"})
    answer = python("\n".join(f"{_snippet(card)}{told}" for card in cards), cwd=trained.root.parent)
    assert answer.code == 0, answer.err
    assert answer.out.count("Once upon a time") == len(records)
    norms = [float(text) for text in re.findall("^NORM (.*)$", answer.out, re.MULTILINE)]
    restorer = Restorer(Ledger(trained.root), trained.cache, torch.device("cpu"))
    expected = [_logits_norm(restorer.model_of(record)[2], ids) for record in records]
    names = [f"{record.name} {record.run_id}" for record in records]
    found, wanted = dict(zip(names, norms, strict=True)), dict(zip(names, expected, strict=True))
    for name, norm in found.items():
        # Plain bitsandbytes lays 4-bit weights out anew for evaluation, which adds up in another order.
        assert norm == pytest.approx(wanted[name], rel=1e-4 if "nf4" in name else 1e-5), name
    untrained = _logits_norm(restorer.model_of(trained.find("base"))[2], ids)
    assert all(abs(norm / untrained - 1) > 1e-4 for norm in norms), "else it would be the untrained base"
    assert len(set(norms)) == len(norms)


def test_cards_name_what_they_need(trained: Lab) -> None:
    for record in trained.runs():
        kind = record.trial["method"]["kind"]
        if kind == "base" or record.trial["init_from"]:
            continue
        card = (record.saved_folder(METHODS[kind].saves) / CARD_FILE).read_text()
        rows = {row[0]: row[1] for row in _rows(card)}
        assert rows["method"] != kind and len(rows["method"]) > 15
        own = {key: value for key, value in record.trial["method"].items() if key != "kind" and value not in (None, [])}
        for key in own:
            assert key.replace("_", " ") in rows["settings of the method"]
        named = [title for title in rows if "rank" in title.split(", ")]
        assert bool(named) == ("rank" in METHODS[kind].uses)
        assert ("import lora_lab" in _snippet(card)) == (kind in ("mov", "molora", "loramoe", "mola", "bottleneck"))
        assert ("load_changed" in _snippet(card)) == (kind in ("freeze", "lisa"))
        assert _head(card)["tags"][:2] == ["lora-lab", kind]
        assert _head(card)["library_name"] == ("peft" if METHODS[kind].trains == "adapter" else "transformers")


def test_a_stage_says_what_it_belongs_on(trained: Lab) -> None:
    stages = [one for one in trained.runs() if one.trial["method"]["kind"] == "dora" and one.trial["init_from"]]
    second, third = stages
    first = trained.find("lora-r8-qv-s0")
    for record, start in (
        (second, f"the weights of run {first.run_id}"),
        (third, f"the adapter of run {second.run_id}"),
    ):
        card = (record.adapter_folder / CARD_FILE).read_text()
        assert f"The adapter belongs on the weights that run `{first.run_id}`" in card
        assert "melt_into_base" in _snippet(card) and "base_model" not in _head(card)
        rows = {row[0]: row[1] for row in _rows(card)}
        assert rows["starts from"] == start
        assert ("lies on" in rows) == (record is third)
    plain = (first.adapter_folder / CARD_FILE).read_text()
    assert "starts from" not in plain and "melt_into_base" not in _snippet(plain)


def test_a_card_of_a_stage_whose_parent_is_gone(tmp_path: Path, make_trial: MakeTrial) -> None:
    folder = _begun(tmp_path, make_trial("init_from=x", "init_as=weights"))
    header = folder.header.model_copy(update={"identities": {"base": "random", "init_weights": "ab" * 32}})
    (folder.path / "environment.json").write_text(json.dumps(MACHINE))
    folder.adapter_folder.mkdir()
    write_cards(folder.path, header, _result(folder))
    card = (folder.adapter_folder / CARD_FILE).read_text()
    assert "It belongs on the weights of run `abababababababab`, which is no longer there." in card


def _logits_norm(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits.double().norm())


def test_the_hub_reads_the_scores(tmp_path: Path, make_trial: MakeTrial) -> None:
    card = ModelCard(_card(tmp_path, make_trial()))
    results = card.data.eval_results
    assert results is not None and all(isinstance(result, EvalResult) for result in results)
    found = {(result.dataset_type, result.metric_type): result for result in results}
    assert {key: result.metric_value for key, result in found.items()} == {
        ("skills", "loss"): 2.71828,
        ("skills_unseen", "acc"): 0.5,
        ("skills_unseen", "exact_match"): 0.0,
    }, "the loss of a training step is no score"
    assert found["skills_unseen", "acc"].dataset_args == {"num_few_shot": 2}
    assert found["skills_unseen", "exact_match"].metric_name == "exact_match,strict-match (fraction)"
    written = yaml.safe_load(_card(tmp_path / "again", make_trial()).split("---\n")[1])["model-index"]
    name, read = model_index_to_eval_results(written)
    assert name == "lora-r8-s0"
    assert eval_results_to_model_index(name, read) == written


def test_base_and_data_of_the_hub_are_named_and_a_licence_never(tmp_path: Path, make_trial: MakeTrial) -> None:
    card = _card(tmp_path, make_trial("model=gpt2", "target=attention", "data=gsm8k", "method=dora"))
    head = _head(card)
    assert (head["library_name"], head["base_model"]) == ("peft", "openai-community/gpt2")
    assert head["base_model_relation"] == "adapter" and head["datasets"] == ["openai/gsm8k"]
    assert head["tags"] == ["lora-lab", "dora"] and "license" not in head
    (heldout,) = [result for result in ModelCard(card).data.eval_results or () if result.metric_type == "loss"]
    assert (heldout.dataset_type, heldout.dataset_config, heldout.dataset_revision) == ("openai/gsm8k", "main", "main")
    assert 'base = "openai-community/gpt2"' in _snippet(card)
    assert 'AutoTokenizer.from_pretrained(base, revision="main")' in _snippet(card)


@pytest.mark.parametrize("overrides", [(), ("model=smollm2_135m",), ("model=folder", "model.path=/home/ann/llama")])
def test_a_base_that_is_not_on_the_hub_is_not_named_as_if(
    tmp_path: Path, make_trial: MakeTrial, overrides: tuple[str, ...]
) -> None:
    trial = make_trial(*overrides)
    facts = FACTS | {"model_folder": "/home/ann/cache/models/small-0123"}
    card = _card(tmp_path, trial, facts=facts)
    assert "base_model" not in _head(card)
    assert "/home" not in card and "ann" not in card.replace("cannot", "")
    compile(_snippet(card), "snippet", "exec")
    if trial.model.kind == "embedded":
        assert "lora-lab fetch" in card and 'base = "lab/cache/models/small-0123"' in _snippet(card)


def test_quantization_is_part_of_the_code(tmp_path: Path, make_trial: MakeTrial) -> None:
    card = _card(tmp_path, make_trial("method=qlora", "training.precision=bf16"))
    code = compile(_snippet(card), "snippet", "exec")
    assert {"BitsAndBytesConfig", "nf4", "bfloat16", "load_in_4bit"} <= {*code.co_names, *_constants(code)}
    assert _head(card)["tags"] == ["lora-lab", "lora", "nf4"]


def _constants(code: Any) -> list[str]:
    flat: list[str] = []
    for constant in code.co_consts:
        flat += constant if isinstance(constant, tuple) else [constant]
    return flat


def test_scores_with_their_intervals_and_what_is_missing(tmp_path: Path, make_trial: MakeTrial) -> None:
    missing = {"predicted_peak_allocated_bytes": "not predicted yet", "skills_trained/acc": "the task failed"}
    measured = {"peak_allocated_bytes": 1_234_567_890, "train_seconds": 61.26, "tokens_per_second": 1000.4}
    card = _card(tmp_path, make_trial("seed=3"), missing=missing, measurements=measured)
    rows = {row[0]: row[1:] for row in _rows(card)}
    half = stats.norm.ppf(0.975) * 0.125
    assert rows["skills_unseen/acc"] == [f"0.50 ± {half:.2f}", "64", "0.25", "higher", "fraction"]
    assert rows["heldout/loss"] == ["2.718 ± 0.020", "64", "-", "lower", "nats/token"]
    assert rows["skills_unseen/exact_match,strict-match"][0] == "0 (no interval: all examples alike)"
    assert rows["loss of the last step"] == ["3.5 nats/token"]
    assert "not seeds: this is one run, of seed 3" in card
    assert rows["trained parameters"] == ["1,000 of 20,000 (5 %)"]
    assert rows["peak of allocated memory in training"] == ["1.235 GB"] and rows["training"] == ["61.26 s"]
    assert rows["machine"] == ["Some CPU, 4 cores (2 usable), 8 GB of memory"] and "secret-host" not in card
    for name, reason in missing.items():
        assert f"- `{name}`: {reason}" in card
    assert "- something was cut" in card
    assert rows["commit of LoRA Lab"] == ["c0ffee, with uncommitted changes"]
    assert "bitsandbytes" not in rows["versions"][0]


def test_a_run_that_did_not_complete_says_so_first(tmp_path: Path, make_trial: MakeTrial) -> None:
    reason = "step 7: the loss is NaN (see /home/ann/lab/runs/0/steps.jsonl)"
    card = _card(tmp_path, make_trial(), metrics={}, status=Status.DIVERGED, reason=reason)
    assert "**The run ended as DIVERGED: step 7: the loss is NaN (see …/steps.jsonl).**" in card
    assert "model-index" not in _head(card)


def test_hostile_text_stays_text(tmp_path: Path, make_trial: MakeTrial) -> None:
    trial = make_trial("model=gpt2", "target=attention", "data=gsm8k")
    gpt2 = trial.model.model_copy(update={"repo": HOSTILE, "revision": HOSTILE})
    gsm8k = trial.data.model_copy(update={"repo": HOSTILE, "split": HOSTILE, "config": HOSTILE})
    folder = _begun(tmp_path, trial.model_copy(update={"model": gpt2, "data": gsm8k}), name=HOSTILE)
    metrics = {f"{HOSTILE}/acc,{HOSTILE}": loss(0.5, unit=HOSTILE), f"heldout/{HOSTILE}": loss(1.0)}
    facts = FACTS | {"warnings": [HOSTILE], "device": HOSTILE}
    result = _result(folder, metrics=metrics, facts=facts, missing={HOSTILE: HOSTILE}, status="FAILED", reason=HOSTILE)
    header = folder.header.model_copy(update={"identities": {"base": HOSTILE, "data": HOSTILE, HOSTILE: HOSTILE}})
    machine = MACHINE | {"cpu": HOSTILE, "python": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    card = card_text(folder.adapter_folder, header, result, machine)

    head = _head(card)
    assert set(head) == {"library_name", "pipeline_tag", "tags", "model-index"}, "no repository has such a name"
    shown = " ".join(HOSTILE.replace("\x1b", "").replace("\u202e", "").split())
    assert head["model-index"][0]["name"] == shown
    tokens = _parsed(ModelCard(card).text)
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "s_open", "hr", "code_block"}
    headings = [tokens[index + 1] for index, token in enumerate(tokens) if token.type == "heading_open"]
    assert _text(headings[0]) == shown
    assert len(headings) == 10 and sum(token.type == "fence" for token in tokens) == 1
    fences_and_spans = re.compile(r"^```.*?^```$|(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL | re.MULTILINE)
    outside = fences_and_spans.sub("", ModelCard(card).text.replace(r"\`", ""))
    assert "://" not in outside and "www." not in outside
    assert {len(row) for row in _rows(card)} == {2, 6}
    compile(_snippet(card), "snippet", "exec")
    assert "\x1b" not in card and "\u202e" not in card


def test_a_card_that_cannot_be_written_is_a_machine_error(tmp_path: Path, make_trial: MakeTrial) -> None:
    folder = _begun(tmp_path, make_trial())
    write_cards(folder.path, folder.header, _result(folder))
    assert not list(folder.path.rglob(CARD_FILE)), "nothing was saved, so there is nothing to describe"
    (folder.path / "environment.json").write_text(json.dumps(MACHINE))
    (folder.adapter_folder / CARD_FILE / "in the way").mkdir(parents=True)
    with pytest.raises(MachineError, match=CARD_FILE):
        write_cards(folder.path, folder.header, _result(folder))
    assert [path.name for path in folder.adapter_folder.iterdir()] == [CARD_FILE]


def _parsed(text: str) -> list[Token]:
    """All tokens, those of lines included."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [one for token in tokens for one in (token, *(token.children or ()))]


def _text(token: Token) -> str:
    return "".join(child.content for child in token.children or ())


def _rows(card: str) -> list[list[str]]:
    """The cells of all rows of tables, as text."""
    rows: list[list[str]] = []
    tokens = _parsed(ModelCard(card).text)
    for index, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            rows[-1].append(_text(tokens[index + 1]))
    return rows
