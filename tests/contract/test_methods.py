"""Every axis of a trial trains, for two steps, on the smallest model; and what the plan counted is what was trained."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.app.compose import Composer
from lora_lab.app.planning import Plan, cache_folder, make_plan
from lora_lab.app.request import Request
from lora_lab.errors import InputError
from lora_lab.launch.local import run_jobs
from lora_lab.models.load import load_base
from lora_lab.plan.counts import counts_of
from lora_lab.plan.quantized import tensor_bytes
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Result, Status
from lora_lab.record.step_log import read_steps
from lora_lab.report.progress import Progress
from lora_lab.schema.adaptation import PARTS, Target
from lora_lab.schema.method import METHODS as TABLE
from lora_lab.schema.trial import Trial
from tests.conftest import MakeTrial
from tests.contract.test_every_method import ROWS as METHOD_ROWS
from tests.contract.test_every_method import Row
from tests.journey.program import Lab
from tests.tiers import SLOW, mostly_slow

pytestmark = pytest.mark.usefixtures("one_core")

ALIASES = ("qlora",)
METHODS = (*TABLE, *ALIASES)
OPTIMIZERS = ("adamw", "sgd", "adamw8bit", "paged_adamw", "paged_adamw8bit", "lion", "sophia")
SCHEDULERS = ("constant", "linear", "cosine", "half_cycle_cosine", "wsd")
ADAPTERS = ("lora", "rslora", "dora")
QUANTIZATIONS = ("nf4", "fp4")
GPT2_MODEL = ("model.shape.family=gpt2", "model.shape.num_kv_heads=4")
GPT2 = (*GPT2_MODEL, "target=attention")


@pytest.fixture
def lab(tmp_path: Path, shared: Path) -> Lab:
    """An empty lab."""
    return Lab(tmp_path / "lab", shared)


class Training:
    """Trains trials in an empty lab: plan and runner as the command line calls them, without Hydra's start."""

    def __init__(self, lab: Lab, composer: Composer) -> None:
        self.lab = lab
        self._composer = composer

    def plan(self, *overrides: str) -> Plan:
        """The plan of one trial on the tiny model."""
        return make_plan(Request((self._composer.compose(self.lab.tiny(*overrides)),), None))

    def __call__(self, *overrides: str) -> Result:
        """The completed result of a run, checked against its plan and its step log."""
        plan = self.plan(*overrides)
        (planned,) = plan.rows
        progress = Progress(io.StringIO())
        tally = run_jobs(plan.jobs, Ledger(self.lab.root), plan.lab, cache=cache_folder(plan.lab), watcher=progress)
        assert tally.ran == 1
        record = max(self.lab.runs(), key=lambda one: one.header.claimed_at if one.header else "")
        result = record.result
        assert result is not None
        assert result.status == Status.COMPLETED, result.reason
        assert planned.fingerprint == result.fingerprint
        assert planned.trainable_parameters == result.trainable_parameters
        assert planned.total_parameters == result.total_parameters
        assert planned.missing == {}
        assert result.metrics["heldout/loss"].value > 0
        if record.trial["method"]["kind"] == "base":
            assert planned.steps == 0 and not record.steps_path.exists()
        else:
            assert planned.steps == result.measurements["steps"] == len(read_steps(record.steps_path))
            assert result.measurements["train_rows"] == planned.train_rows
            for name in ("peak_allocated_bytes", "tokens_per_second", "optimizer_state_bytes", "loss_token_fraction"):
                assert name in result.measurements
        return result


@pytest.fixture
def trained(lab: Lab, composer: Composer) -> Training:
    """`trained("rank=4")` is a checked result."""
    return Training(lab, composer)


def settings(method: str) -> tuple[str, ...]:
    """What makes a method fit the tiny model, and two steps."""
    schedule = ("method.final_share=0",) if method == "adalora" else ()
    return (f"method={method}", *METHOD_ROWS.get(method, Row()).settings, *schedule)


@pytest.mark.parametrize("method", METHODS)
def test_method(trained: Training, method: str) -> None:
    result = trained(*settings(method))
    assert (result.trainable_parameters == 0) == (method == "base")
    form = TABLE["lora" if method in ALIASES else method].saves
    saved = [one for one in ("adapter", "model", "changed") if f"{one}_file_bytes" in result.measurements]
    assert saved == ([] if form == "nothing" else [form])
    assert (result.facts["quantization"] is None) == (method != "qlora")


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("double", ["false", "true"])
def test_quantization(trained: Training, kind: str, double: str) -> None:
    result = trained(f"quantization={kind}", f"quantization.double_quantization={double}")
    facts = result.facts["quantization"]
    assert (facts["kind"], facts["double_quantization"]) == (kind, double == "true")
    sizes = [64 * 64, 64 * 32, 64 * 32, 64 * 64, 64 * 128, 64 * 128, 64 * 128] * 2
    expected = [tensor_bytes(size, double_quantization=double == "true") for size in sizes]
    assert facts["tensors"] == len(sizes)
    assert facts["parameters"] == sum(sizes)
    assert facts["packed_bytes"] == sum(sizes) // 2
    assert facts["constant_bytes"] == sum(one.constant_bytes for one in expected)
    assert facts["code_book_bytes"] == sum(one.code_book_bytes for one in expected)
    bits = 8 * (facts["packed_bytes"] + facts["constant_bytes"]) / facts["parameters"]
    assert facts["bits_per_parameter"] == pytest.approx(bits)


@pytest.mark.parametrize("method", mostly_slow(["base", "rslora", "dora"], keep=("dora",)))
def test_quantization_with_other_methods(trained: Training, method: str) -> None:
    assert trained(f"method={method}", "quantization=nf4").facts["quantization"]["kind"] == "nf4"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer(trained: Training, optimizer: str) -> None:
    rate = "1e-4" if optimizer == "lion" else "2e-3"
    result = trained(f"optimizer={optimizer}", "target=all_linear", "rank=64", f"learning_rate={rate}")
    facts = result.facts["optimizer"]
    assert (
        facts["class"]
        == {
            "adamw": "torch.AdamW",
            "sgd": "torch.SGD",
            "adamw8bit": "bitsandbytes.AdamW8bit",
            "paged_adamw": "bitsandbytes.PagedAdamW32bit",
            "paged_adamw8bit": "bitsandbytes.PagedAdamW8bit",
            "lion": "bitsandbytes.Lion",
            "sophia": "lora_lab.Sophia",
        }[optimizer]
    )
    assert facts["paging"].startswith("asked for, not active on cpu" if "paged" in optimizer else "off")
    bytes_each = result.measurements["optimizer_state_bytes"] / (result.trainable_parameters or 1)
    states = {"adamw": 8, "paged_adamw": 8, "sgd": 4, "lion": 4, "sophia": 8}
    if optimizer in states:
        assert bytes_each == pytest.approx(states[optimizer], rel=1e-2)
    else:
        assert 2 < bytes_each < 3, "two 8-bit states, their constants, and the code books"


@pytest.mark.parametrize("momentum", [("0.0", "false"), ("0.5", "true")])
def test_sgd_with_and_without_momentum(trained: Training, momentum: tuple[str, str]) -> None:
    value, nesterov = momentum
    result = trained("optimizer=sgd", f"optimizer.momentum={value}", f"optimizer.nesterov={nesterov}")
    assert (result.measurements["optimizer_state_bytes"] == 0) == (value == "0.0")


@pytest.mark.parametrize("warmup", ["scheduler.warmup_steps=1", "scheduler.warmup_steps=0"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler(trained: Training, scheduler: str, warmup: str) -> None:
    trained(f"scheduler={scheduler}", warmup, "learning_rate=0.5")
    rates = [line["learning_rate"] for line in read_steps(trained.lab.only().steps_path)]
    if warmup.endswith("1"):
        assert rates == [0.0, 0.5]
    else:
        second = {"constant": 1.0, "linear": 0.5, "cosine": 0.55, "half_cycle_cosine": 0.5, "wsd": 1.0}[scheduler]
        assert rates == pytest.approx([0.5, 0.5 * second])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_precision(trained: Training, precision: str) -> None:
    assert trained(f"training.precision={precision}").facts["precision"] == precision


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        ("every_layer", "lora"),
        ("2", "full"),
        *(pytest.param(*one, marks=SLOW) for one in itertools.product(["off", "sqrt"], ["lora", "full"])),
        pytest.param("every_layer", "full", marks=SLOW),
        pytest.param("2", "lora", marks=SLOW),
    ],
)
def test_gradient_checkpointing_changes_memory_and_not_the_result(trained: Training, mode: str, method: str) -> None:
    """Layers of 8 rows with 2 checkpointed segments, against none; the scores must agree to rounding."""
    shape = ("model.shape.num_layers=4", "training.batch_size=8", "training.micro_batch_size=8", f"method={method}")
    result = trained(*shape, f"training.gradient_checkpointing={mode}")
    if mode == "off":
        return
    plain = trained(*shape)
    assert result.metrics["heldout/loss"].value == pytest.approx(plain.metrics["heldout/loss"].value, rel=1e-6)
    assert result.measurements["peak_allocated_bytes"] < plain.measurements["peak_allocated_bytes"]


@pytest.mark.parametrize("method", mostly_slow(METHODS, keep=("lora", "bottleneck")))
def test_gpt2_shape(trained: Training, method: str) -> None:
    row = METHOD_ROWS.get(method, Row(gpt2=("target=attention",)))
    trained(*GPT2_MODEL, *settings(method), *row.gpt2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("dropout=0.2",),
        ("alpha=r/2",),
        ("training.micro_batch_size=2",),
        ("training.max_gradient_norm=null",),
        ("optimizer.weight_decay=0.1",),
        ("data.loss_on=all",),
        ("data.template=alpaca",),
        ("target=embedding",),
        ("target=head",),
        ("target=all_linear_head",),
        ("target=[query,mlp,head]",),
        ("target=[q_proj,down_proj]",),
        ("model.shape.tied_embeddings=true", "model.tie_embeddings=false", "target=head"),
        ("model.shape.tied_embeddings=true", "method=full"),
        ("model.shape.family=qwen2",),
        ("model.shape.family=mistral",),
        ("seeds.data=1", "seeds.init=2", "seeds.dropout=3"),
    ],
    ids=" ".join,
)
def test_axis(trained: Training, overrides: tuple[str, ...]) -> None:
    trained(*overrides)


def test_epochs_count_every_row_once(trained: Training) -> None:
    result = trained("training.epochs=2", "training.max_steps=null", "data.train_size=11")
    assert result.measurements["steps"] == 6, "two epochs of 4 + 4 + 3 rows"
    tokens = [line["tokens"] for line in read_steps(trained.lab.only().steps_path)]
    assert sum(tokens[:3]) == sum(tokens[3:])


@pytest.mark.parametrize("method", ["qlora", "dora", "full"])
def test_half_precision_with_a_method(trained: Training, method: str) -> None:
    trained("training.precision=bf16", f"method={method}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=full", "quantization=nf4"), "cannot be trained themselves"),
        (("method=qlora", "training.precision=fp64"), "fp64 does not combine"),
        (("optimizer=lion", "training.precision=fp64"), "fp64 does not combine"),
        (("model.shape.tied_embeddings=true", "target=head"), "model.tie_embeddings=false makes a copy"),
        (("model.shape.tied_embeddings=true", "target=embedding"), "model.tie_embeddings=false makes a copy"),
        ((*GPT2[:2], "target=qv"), "name all three or none"),
        (("rank=65",), "rank"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_combine_is_refused(trained: Training, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        trained.plan(*overrides)
    assert not trained.lab.root.exists()


@pytest.mark.parametrize("method", mostly_slow(["prompt_tuning", "p_tuning", "prefix_tuning"], keep=("prefix_tuning",)))
def test_rows_that_do_not_fit_behind_the_virtual_tokens_stop_the_run_before_training(lab: Lab, method: str) -> None:
    """How long rows really are is known only once they are tokenised; data.max_length alone says nothing."""
    shape = ("model.shape.max_positions=100", "data.max_length=100")
    answer = lab.run(f"method={method}", "method.virtual_tokens=40", *shape)
    assert answer.code == 3
    result = lab.only().result
    assert result is not None and result.status == Status.FAILED and result.reason is not None
    assert "40 virtual tokens and a row of" in result.reason and "use data.max_length <= 60" in result.reason
    assert not lab.only().steps_path.exists() and not lab.only().adapter_folder.exists()
    assert lab.run(f"method={method}", "method.virtual_tokens=2", shape[0], "data.max_length=98").code == 0


ROWS: dict[str, list[dict[str, Any]]] = {
    "instruction": [{"instruction": "add", "input": f"{n} and 1", "output": str(n + 1)} for n in range(20)],
    "completion": [{"prompt": f"{n} ->", "completion": f" {n + 1}"} for n in range(20)],
    "chat": [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(20)
    ],
    "text": [{"text": f"{n} comes before {n + 1}."} for n in range(20)],
}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("said", mostly_slow(["auto", "named"], keep=("auto",)))
def test_jsonl(trained: Training, tmp_path: Path, form: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS[form])
    overrides = jsonl(path, f"data.format={form if said == 'named' else 'auto'}", f"data.loss_on={loss_on(form)}")
    result = trained(*overrides)
    assert result.measurements["train_rows"] == 15
    assert result.metrics["heldout/loss"].num_examples == 5


def test_jsonl_with_a_heldout_file(trained: Training, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["completion"][:16])
    write_rows(tmp_path / "heldout.jsonl", ROWS["completion"][16:])
    result = trained(*jsonl(tmp_path / "rows.jsonl", f"data.heldout_path='{tmp_path / 'heldout.jsonl'}'"))
    assert result.measurements["train_rows"] == 16
    assert result.metrics["heldout/loss"].num_examples == 4


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def jsonl(path: Path, *more: str) -> list[str]:
    """Overrides of a trial on a JSON-lines file: `data.train_size` of the smallest trial has no place there."""
    return ["data=jsonl", f"data.path='{path}'", "data.heldout_size=5", *more]


def loss_on(form: str) -> str:
    return "all" if form == "text" else "answer"


def _targets() -> Iterator[Target]:
    linear = [part for part in PARTS if part != "embedding"]
    for size in range(1, len(linear) + 1):
        for chosen in itertools.combinations(linear, size):
            yield Target(**{part: part in chosen for part in PARTS}, modules=())
    yield Target(**{part: part == "embedding" for part in PARTS}, modules=())
    yield Target(**dict.fromkeys(PARTS, True), modules=())


@pytest.mark.parametrize("method", mostly_slow(["lora", "dora"], keep=("lora",)))
@pytest.mark.parametrize(
    "model",
    [(), ("model.shape.tied_embeddings=true", "model.tie_embeddings=false")],
    ids=["untied", "untied by a copy"],
)
def test_counts_of_all_targets(make_trial: MakeTrial, shared: Path, model: tuple[str, ...], method: str) -> None:
    """The 63 combinations of linear parts, the embedding, and everything."""
    trial = make_trial(*model, f"method={method}", "rank=3")
    targets = list(_targets())
    assert len(targets) == 65
    for target in targets:
        assert _planned(trial, target) == _attached(trial, target, shared), target.parts


def test_counts_of_gpt2_targets(make_trial: MakeTrial, shared: Path) -> None:
    trial = make_trial(*GPT2, "model.shape.tied_embeddings=true", "model.tie_embeddings=false", "method=lora")
    together = ("query", "key", "value")
    for size in range(3):
        for rest in itertools.combinations(("projection", "mlp", "head"), size):
            chosen = together + rest
            target = Target(**{part: part in chosen for part in PARTS}, modules=())
            assert _planned(trial, target) == _attached(trial, target, shared), chosen


def _planned(trial: Trial, target: Target) -> tuple[int, int]:
    counts = counts_of(trial.model_copy(update={"target": target}))
    assert counts is not None
    return counts.trainable_parameters, counts.total_parameters


def _attached(trial: Trial, target: Target, cache: Path) -> tuple[int, int]:
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=cache)
    counts = count_parameters(attach(base.model, trial.model_copy(update={"target": target})).model)
    return counts.trainable, counts.total


def fingerprints(lab: Lab, *overrides: str) -> list[str]:
    answer = lab.plan("-m", *overrides, "--json")
    assert answer.code == 0, answer.err
    return [row["fingerprint"] for row in answer.json()]


def test_qlora_is_an_alias(lab: Lab) -> None:
    (alias,) = fingerprints(lab, "method=qlora")
    long_form = ("quantization=nf4", "quantization.double_quantization=true", "optimizer=paged_adamw")
    assert fingerprints(lab, "method=lora", *long_form) == [alias]
    assert fingerprints(lab, "method=lora", "quantization=nf4", "optimizer=paged_adamw") != [alias]


@pytest.mark.parametrize(
    "equal",
    [
        ("tag=a,b,null",),
        ("repeat=0,1",),
        ("alpha=16,2r,16.0",),
        ("target=qv,[query,value],[value,query]",),
        ("method=full", "rank=4,8", "dropout=0.0,0.5"),
        ("method=base", "seed=0,1", "optimizer=sgd,adamw", "learning_rate=1,2"),
        ("seed=0", "seeds.data=0,null"),
    ],
    ids=" ".join,
)
def test_what_is_not_in_a_fingerprint(lab: Lab, equal: tuple[str, ...]) -> None:
    assert len(set(fingerprints(lab, *equal))) == 1


def test_housekeeping_is_not_in_a_fingerprint(lab: Lab, tmp_path: Path) -> None:
    elsewhere = Lab(tmp_path / "elsewhere", tmp_path / "other cache")
    assert fingerprints(lab) == fingerprints(elsewhere, "launch.retries=3", "fail_fast=true", "max_runs=7")


@pytest.mark.parametrize(
    "different",
    [
        "seed=0,1",
        "seeds.data=0,1",
        "seeds.init=0,1",
        "seeds.dropout=0,1",
        "rank=4,8",
        "alpha=r,2r",
        "dropout=0.0,0.1",
        "learning_rate=1e-3,2e-3",
        "method=lora,dora,rslora,full,base",
        "quantization=none,nf4,fp4",
        "target=qv,attention,mlp",
        "optimizer.eps=1e-8,1e-7",
        "scheduler=linear,constant",
        "scheduler.warmup_steps=0,1",
        "training.max_steps=2,3",
        "training.precision=fp32,bf16",
        "training.max_gradient_norm=1.0,null",
        "training.micro_batch_size=2,4",
        "data.train_size=16,17",
        "data.max_length=256,100",
        "evaluation.heldout=true,false",
        "model.seed=0,1",
        "model.shape.hidden_size=64,128",
    ],
)
def test_what_is_in_a_fingerprint(trained: Training, different: str) -> None:
    key, _, values = different.partition("=")
    found = [row.fingerprint for value in values.split(",") for row in trained.plan(f"{key}={value}").rows]
    assert len(set(found)) == len(found) > 1


def test_data_files_are_known_by_their_content(lab: Lab, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    write_rows(first, ROWS["completion"])
    write_rows(second, ROWS["completion"])
    assert fingerprints(lab, *jsonl(first)) == fingerprints(lab, *jsonl(second))
    write_rows(second, ROWS["completion"][:-1])
    assert fingerprints(lab, *jsonl(first)) != fingerprints(lab, *jsonl(second))
