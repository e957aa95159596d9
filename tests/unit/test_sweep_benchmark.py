"""The bookkeeping of `make bench-sweep`: both sides train the same, the pair that is fed alike, its files."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import TrainingArguments

from lora_lab.adapters.attach import attach
from lora_lab.data.encode import encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.train.loop import train
from lora_lab.train.member import member_of
from tests.benchmarks.sweep_app import SIX_TASKS, AppConfig
from tests.benchmarks.sweep_equality import LOSS_TOLERANCE, fed_run
from tests.benchmarks.sweep_plan import FULL, GROWTH, RATES, TRIALS, Run, Sweep, of_trials
from tests.benchmarks.sweep_plot import write_plot
from tests.benchmarks.sweep_speed import jobs
from tests.benchmarks.sweep_table import sweep_text, totals
from tests.benchmarks.sweep_turns import Places, run_process
from tests.benchmarks.train_rows import base_of
from tests.benchmarks.train_trainer import arguments

TINY = Sweep(RATES[:1], seeds=1, steps=3, questions=None, model="tiny_random", heldout=True)


def result(**parts: Any) -> dict[str, Any]:
    facts = {"quick": False, "threads": 1, "dtype": "float32", "sweep": FULL.facts(), "seconds": 1.0}
    empty: dict[str, Any] = {part: {} for part in ("ours", "theirs", "equality", "growth")}
    return {**facts, "matrix_product_gflops": [1.0], **empty, **parts}


def spent(seconds: float, **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "cpu_seconds": seconds, "failed": None, "load_average": [0.0, 0.0], "runs": {}, **more}


def test_both_sides_ask_for_the_same_training(tmp_path: Path) -> None:
    """What the Trainer is not told is its default, and must be what the lab has."""
    run = FULL.runs()[3]
    trial = FULL.trial(run, Path("rows"))
    app = AppConfig()
    told = arguments(tmp_path, batch=8, micro_batch=2, steps=app.steps, learning_rate=run.learning_rate, seed=run.seed)
    theirs: Any = TrainingArguments(**told)
    optimizer: Any = trial.optimizer
    ours = trial.training
    assert (trial.learning_rate, trial.seed) == (theirs.learning_rate, theirs.seed) == (run.learning_rate, run.seed)
    assert (ours.max_steps, ours.max_gradient_norm) == (theirs.max_steps, theirs.max_grad_norm) == (FULL.steps, 1.0)
    assert ours.batch_size == theirs.per_device_train_batch_size * theirs.gradient_accumulation_steps
    assert ours.micro_batch_size == theirs.per_device_train_batch_size == app.micro_batch
    assert (optimizer.kind, trial.scheduler.kind) == ("adamw", theirs.lr_scheduler_type.value) == ("adamw", "linear")
    assert theirs.optim.startswith("adamw_torch")
    assert (optimizer.betas, optimizer.eps) == ((theirs.adam_beta1, theirs.adam_beta2), theirs.adam_epsilon)
    assert optimizer.weight_decay == theirs.weight_decay == theirs.warmup_steps == 0
    assert not (theirs.bf16 or theirs.fp16 or theirs.gradient_checkpointing)
    assert (trial.rank, trial.alpha, trial.dropout) == (app.rank, app.alpha, 0.0)
    assert trial.target.query and trial.target.value and not trial.target.mlp and app.target == "qv"
    assert tuple(trial.evaluation.tasks) == SIX_TASKS
    assert (trial.evaluation.limit, trial.evaluation.batch_size) == (app.questions, app.eval_batch)


def test_trials_of_a_growing_sweep() -> None:
    assert [len(of_trials(GROWTH, trials).runs()) for trials in TRIALS] == list(TRIALS)
    assert of_trials(GROWTH, 2).runs() == [Run(RATES[0], 0), Run(RATES[1], 0)]
    assert len(set(of_trials(GROWTH, 32).runs())) == 32
    with pytest.raises(ValueError, match="multiple"):
        of_trials(GROWTH, 6)


def test_sides_take_turns(tmp_path: Path) -> None:
    options = Namespace(parts=["sweep"], their_runs=3, quick=False)
    places = Places(tmp_path, tmp_path, tmp_path, threads=1)
    names = [(part, name) for part, name, _ in jobs(options, FULL, places)]
    runs = [run.name for run in FULL.runs()]
    assert names == [
        ("ours", "first"),
        ("theirs", runs[0]),
        ("theirs", runs[1]),
        ("ours", "second"),
        ("theirs", runs[2]),
    ]


def test_the_total_of_theirs_is_a_sum() -> None:
    """Runs that were not measured count at the mean of the others, and the text says so."""
    ours = {"first": spent(10.0), "second": spent(14.0)}
    theirs = {run.name: spent(30.0 + index, seconds_of={}) for index, run in enumerate(FULL.runs())}
    assert totals(result(ours=ours, theirs=theirs)) == {
        "ours": 12.0,
        "theirs": pytest.approx(8 * 30 + 28),
        "ratio": pytest.approx(268 / 12),
        "measured": 8,
        "trials": 8,
    }
    some = result(ours=ours, theirs=dict(list(theirs.items())[:2]))
    assert totals(some) is not None
    assert "theirs 244 s, 6 of them at the mean of the others" in sweep_text(some)
    assert totals(result(ours=ours)) is None


def test_time_that_a_cohort_shares_is_counted_once() -> None:
    shared = [("a", 5.0, 1.0), ("a", 7.0, 2.0), ("b", 4.0, 3.0)]
    runs = {
        str(index): {
            "cohort": cohort,
            "measurements": {"cohort_train_seconds": seconds, "evaluate_seconds": evaluated},
        }
        for index, (cohort, seconds, evaluated) in enumerate(shared)
    }
    text = sweep_text(result(ours={"first": spent(30.0, runs=runs)}))
    assert "(train 11, evaluate 6)" in text


def test_a_process_that_fails_says_how(tmp_path: Path) -> None:
    good = run_process([sys.executable, "-c", "sum(range(10**6))"], tmp_path / "log", threads=1)
    assert good.failed is None and good.cpu_seconds > 0 and good.seconds > 0
    bad = run_process([sys.executable, "-c", "raise SystemExit('no such rows')"], tmp_path / "log", threads=1)
    assert bad.failed is not None and "exit code 1" in bad.failed and "no such rows" in bad.failed


@pytest.mark.usefixtures("one_core")
def test_the_trainer_fed_alike_trains_alike(shared: Path) -> None:
    """transformers' own loop, loss and optimizer against the lab's, on the lab's order of rows."""
    trial = TINY.trial(TINY.runs()[0], None)
    losses, weights = fed_run(trial, shared)
    base = base_of(trial, shared)
    rows = load_rows(trial.data, cache=shared).train
    examples = encode_rows(rows, base.tokenizer, trial.data, vocab_size=base.model.config.vocab_size).examples
    attached = attach(base.model, trial)
    member = member_of(trial, attached, examples, name="ours")
    pad_id = base.tokenizer.pad_token_id
    train(attached.model, [member], pad_id=pad_id, device=torch.device("cpu"), on_step=lambda _member, _record: None)
    assert losses == pytest.approx([record.loss for record in member.records], abs=LOSS_TOLERANCE / 10)
    own = get_peft_model_state_dict(attached.model)
    assert set(own) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(own[name], weight, atol=1e-6, rtol=1e-4)
    assert sum(float(weight.abs().sum()) for name, weight in weights.items() if "lora_B" in name) > 0, "it has moved"


def test_text_and_plot_of_every_part(tmp_path: Path) -> None:
    pair = {
        "run": "lora-r8-qv-s0",
        "executed": "cohort",
        "steps": 2,
        "loss": 1e-6,
        "weights": 1e-7,
        "weights_relative": 1e-6,
        "within": True,
        "losses": {"ours": [2.0, 1.0], "theirs": [2.0, 1.0]},
    }
    theirs = {"learning_rate=0.001 seed=0": spent(30.0, seconds_of={"train": 20.0})}
    growth = {"1": spent(3.0), "2": spent(4.0)}
    found = result(ours={"first": spent(30.0)}, theirs=theirs, equality={"pair": pair}, growth=growth)
    write_plot(json.loads(json.dumps(found)), tmp_path / "plot.html")
    assert "<script" in (tmp_path / "plot.html").read_text()
    text = sweep_text(found)
    assert "losses at most 1.0e-06 apart" in text and "2 trials: 4 s, 2.0 s each" in text
    assert "BEYOND" in sweep_text(result(equality={"pair": {**pair, "within": False}}))
