"""The bookkeeping of `make bench-memory`: what its trials cover, what it calls an error, what it leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_lab.errors import MachineError, Problem
from lora_lab.predict.predictor import predict
from lora_lab.schema.method import METHODS
from tests.benchmarks import memory_measured
from tests.benchmarks.memory_lisa import PAIRS, Planner, held_gb
from tests.benchmarks.memory_measured import results, summary_of
from tests.benchmarks.memory_plot import write_plot
from tests.benchmarks.memory_trials import Case, cases
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.usefixtures("one_core")
CONF = CHECKOUT / "conf"
TINY = Case("qwen2, 12 layers", "rank=4", 2, 2, 40)


def test_the_trials_cover_every_choice() -> None:
    trials = [case.trial() for case in cases(quick=False)]
    assert len(trials) >= 60
    assert {trial.method.kind for trial in trials} == set(METHODS) - {"base"}
    for group in ("optimizer", "quantization"):
        known = {path.stem for path in (CONF / group).glob("*.yaml")}
        assert {getattr(trial, group).kind for trial in trials} == known
    training = [trial.training for trial in trials]
    assert {one.precision for one in training} == {"fp32", "bf16", "fp64"}
    assert {one.gradient_checkpointing for one in training} == {"off", "every_layer", "sqrt"}
    assert any(one.micro_batch_size < one.batch_size for one in training)
    assert 8 <= len(cases(quick=True)) <= 12


def test_a_true_prediction_passes_and_a_false_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = results([TINY], tmp_path)
    assert abs(found["error_percent"]) < 0.1
    assert summary_of([found])["above_limit"] == 0
    true = predict

    def wrong(*arguments: Any, **settings: Any) -> Any:
        one = true(*arguments, **settings)
        return replace(one, peak_allocated_bytes=one.peak_allocated_bytes * 103 // 100)

    monkeypatch.setattr(memory_measured, "predict", wrong)
    (found,) = results([TINY], tmp_path)
    assert found["error_percent"] == pytest.approx(3, abs=0.1)
    assert summary_of([found])["above_limit"] == 1


def test_a_base_that_is_not_here_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise MachineError(Problem("model", "no such package"))

    monkeypatch.setattr(memory_measured, "load_base", absent)
    found = list(results([TINY], tmp_path))
    assert "no such package" in found[0]["skipped"]
    summary = summary_of(found)
    assert (summary["trials"], summary["skipped"], summary["failed"]) == (0, 1, 0)
    write_plot(found, [], tmp_path / "plot.html")
    assert (tmp_path / "plot.html").is_file()


def test_steps_one_after_the_other_leave_a_base_as_it_was(tmp_path: Path) -> None:
    """Full training between two of LoRA: the same bytes as on a base of its own."""
    full = replace(TINY, overrides="method=full")
    order = [TINY, full, TINY]
    together = [one["measured_bytes"] for one in results(order, tmp_path)]
    assert together == [next(results([case], tmp_path))["measured_bytes"] for case in order]


def test_what_fp32_training_holds() -> None:
    """LISA on Llama-3.1-8B: 8.03e9 x 4 bytes, and 12 for each of 1,486,901,248 (published sum: 50.0 GB)."""
    (pair,) = [one for one in PAIRS if one.name == "Llama-3.1-8B"]
    one = Planner().predicted(*pair.model, "method=lora", "rank=16", "target=qv", tokens=16)
    assert one.trainable_parameters == 32 * 16 * (4096 + 4096 + 4096 + 1024)
    as_lisa = replace(one, trainable_parameters=1_486_901_248)
    assert held_gb(as_lisa, own=False)["with_gradients_gb"] == pytest.approx(49.96, abs=0.01)
