"""A predicted step against the same step on real tensors: the same bytes, and the same course, for every method.

The real one is counted by dispatch; that count agrees with PyTorch's profiler (test_memory, and at the end here).
"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lora_lab.plan.prediction import LongestRows
from lora_lab.plan.timeline import Place, Timeline
from lora_lab.predict import depths
from lora_lab.predict.depths import estimate
from lora_lab.predict.fake_model import model_config
from lora_lab.predict.predictor import Unpredictable, predict
from lora_lab.predict.traced_step import TracedStep, traced_step
from lora_lab.schema.method import METHODS, ROUTED_KINDS
from lora_lab.schema.trial import Trial
from tests.conftest import MakeTrial
from tests.parity.test_memory import allocation_deltas, running_peak
from tests.real_step import real_step
from tests.tiers import mostly_slow

pytestmark = pytest.mark.usefixtures("one_core")

MICRO = ("training.batch_size=4", "training.micro_batch_size=4")
# Two micro-batches: gradients of the first are alive in the second.
SPLIT = ("training.batch_size=4", "training.micro_batch_size=2")
GPT2 = ("model=tiny_random", "model.shape.family=gpt2", "model.shape.num_kv_heads=4", "target=all_linear")
# One of each method, and some of each quantization, optimizer and base: what every test run traces.
CASES = [
    ("method=lora", "dropout=0.1", "target=all_linear", "rank=3"),
    ("method=rslora", "target=all_linear_head"),
    ("method=lora_plus", *SPLIT),
    ("method=dora", "target=all_linear"),
    ("method=pissa",),
    ("method=olora",),
    ("method=adalora",),
    ("method=ia3", "target=ia3"),
    ("method=prompt_tuning",),
    ("method=p_tuning",),
    ("method=prefix_tuning",),
    ("method=bottleneck", "method.style=houlsby"),
    ("method=mov", "target=ia3"),
    ("method=molora", "target=all_linear"),
    ("method=loramoe",),
    ("method=mola", "method.experts=[2,4]"),
    ("method=full", *SPLIT, "training.gradient_checkpointing=every_layer"),
    ("method=freeze", "method.last_layers=1"),
    ("method=lisa", "method.layers=1"),
    ("method=galore",),
    ("quantization=nf4", "quantization.double_quantization=true", "target=all_linear", "training.precision=bf16"),
    ("quantization=int8", "method=adalora", "training.gradient_checkpointing=every_layer"),
    ("optimizer=paged_adamw8bit", "target=all_linear"),
    ("optimizer=sophia",),
    ("model=tiny_random", "model.tie_embeddings=false", "model.shape.tied_embeddings=true", "target=all_linear_head"),
    ("training.precision=bf16", "training.gradient_checkpointing=sqrt"),
    (*GPT2, "quantization=nf4"),
    (*GPT2, "method=full", "training.gradient_checkpointing=every_layer"),
]
MORE_CASES = [
    ("method=lora",),
    ("method=prefix_tuning", "training.gradient_checkpointing=every_layer"),
    ("method=bottleneck", "method.style=parallel"),
    ("method=full",),
    ("method=galore", "optimizer=adamw8bit"),
    ("quantization=nf4",),
    ("quantization=fp4", "method=bottleneck"),
    ("quantization=nf4", "method=dora"),
    ("quantization=int8",),
    ("optimizer=adamw8bit", "method=full"),
    ("optimizer=sgd",),
    ("optimizer=lion",),
    ("target=embedding",),
    ("training.precision=fp64",),
    ("model=tiny_random", "model.shape.family=qwen2", "method=dora"),
    ("model=tiny_random", "model.shape.family=mistral"),
    GPT2,
    (*GPT2, "quantization=int8", "training.precision=bf16"),
]


def uneven_rows(trial: Trial) -> LongestRows:
    lengths = [40 - 7 * index for index in range(trial.training.batch_size)]
    return LongestRows(tuple(lengths), tuple(length // 2 for length in lengths), "made up")


def sized(trial_lines: tuple[str, ...]) -> tuple[str, ...]:
    return trial_lines if any("batch_size" in line for line in trial_lines) else (*trial_lines, *MICRO)


def traced(trial: Trial, rows: LongestRows) -> TracedStep:
    return traced_step(trial, rows, model_config(trial), device_kind="cpu")


def births(timeline: Timeline) -> Counter[tuple[int, Place]]:
    return Counter((event.change, event.place) for event in timeline.events if event.change >= 1024)


def test_every_method_has_a_case() -> None:
    named = {line.partition("=")[2] for case in CASES for line in case if line.startswith("method=")}
    aliases = {"qlora"}  # lora on nf4
    assert set(METHODS) - {"base"} <= named | aliases


@pytest.mark.parametrize("lines", mostly_slow([*CASES, *MORE_CASES], keep=CASES), ids=" ".join)
def test_the_step_that_is_traced_is_the_one_that_runs(
    make_trial: MakeTrial, lines: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trial = make_trial(*sized(lines))
    rows = uneven_rows(trial)
    predicted = traced(trial, rows)
    measured = real_step(trial, rows, tmp_path_factory.getbasetemp() / "prediction")
    assert predicted.timeline.peak.parts == measured.timeline.peak.parts
    assert predicted.timeline.peak.total == measured.peak_bytes
    # Not only the peak: as many storages of each size come alive at each place. (Of a router's entropy, x log x, the
    # derivative is another formula where tensors are of a class of their own: one more mask.)
    if trial.method.kind not in ROUTED_KINDS:
        assert births(predicted.timeline) == births(measured.timeline)


DEPTHS: list[tuple[str, ...]] = [
    (),
    ("target=all_linear", "quantization=nf4", "dropout=0.1"),
    ("training.gradient_checkpointing=every_layer", "target=all_linear"),
    ("method=full", "training.batch_size=4", "training.micro_batch_size=2"),
    ("method=full", "training.gradient_checkpointing=every_layer"),
    ("method=prefix_tuning",),
    ("method=molora", "target=mlp"),
    # The update moves the peak: many gradients, hardly any activations.
    ("method=galore", "training.gradient_checkpointing=every_layer", "data.max_length=32"),
]


@pytest.mark.parametrize("lines", mostly_slow(DEPTHS, keep=[DEPTHS[0], DEPTHS[4]]), ids=" ".join)
def test_two_depths_tell_what_a_trace_in_full_tells(make_trial: MakeTrial, lines: tuple[str, ...]) -> None:
    trial = make_trial("model=tiny_random", "model.shape.num_layers=10", *sized(lines))
    rows = uneven_rows(trial)
    found = estimate(trial, rows, model_config(trial), device_kind="cpu")
    whole = traced(trial, rows)
    assert found.how == "from 3 and 4 of 10 layers"
    assert (found.peak.parts, found.peak.place) == (whole.timeline.peak.parts, whole.timeline.peak.place)
    assert (found.trainable_parameters, found.total_parameters) == whole.counts
    assert found.base_bytes == whole.base_bytes


RUN_OVER: list[tuple[str, ...]] = [
    (),
    ("target=all_linear", "quantization=nf4", "dropout=0.1"),
    ("method=full", *SPLIT, "training.gradient_checkpointing=every_layer"),
    ("method=dora", "target=mlp"),
]


@pytest.mark.parametrize("lines", mostly_slow(RUN_OVER, keep=[RUN_OVER[2]]), ids=" ".join)
def test_the_allocator_is_run_over_all_layers(
    make_trial: MakeTrial, lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (
        "model=tiny_random",
        "model.shape.num_layers=10",
        "model.shape.hidden_size=512",
        "model.shape.mlp_size=1536",
    )
    trial = make_trial(*size, *sized(lines))
    rows = LongestRows((600, 500, 400, 300), (300, 250, 200, 150), "made up")
    found = estimate(trial, rows, model_config(trial), device_kind="cuda")
    assert found.how == "from 3 and 4 of 10 layers"
    monkeypatch.setattr(depths, "_WORTH_IT", 100)
    whole = estimate(trial, rows, model_config(trial), device_kind="cuda")
    assert whole.how == "in full: 10 layers"
    assert found.peak == whole.peak
    assert found.reserved_bytes == whole.reserved_bytes


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (("method=lisa", "method.layers=2"), "lisa trains some layers"),
        (("method=lora", "method.rank_factors=[0.5,2]"), "lora with settings by layer"),
        (("training.gradient_checkpointing=sqrt",), "segments of several layers"),
        (("model.shape.num_layers=8",), "8 layers"),
    ],
    ids=" ".join,
)
def test_layers_that_differ_are_traced_in_full(make_trial: MakeTrial, lines: tuple[str, ...], why: str) -> None:
    depth = () if any("num_layers" in line for line in lines) else ("model.shape.num_layers=10",)
    trial = make_trial("model=tiny_random", *depth, *sized(lines))
    assert estimate(trial, uneven_rows(trial), model_config(trial), device_kind="cpu").how == f"in full: {why}"


def test_layers_that_leave_more_than_they_find_are_traced_in_full(make_trial: MakeTrial) -> None:
    """Routers are listened to until the step's end."""
    trial = make_trial("model=tiny_random", "model.shape.num_layers=10", "method=molora", "target=mlp", *MICRO)
    found = estimate(trial, uneven_rows(trial), model_config(trial), device_kind="cuda")
    assert found.how.startswith("in full: its layers differ")


def test_cuda_counts_in_blocks_and_reserves_more(make_trial: MakeTrial) -> None:
    trial = make_trial(*MICRO)
    rows = uneven_rows(trial)
    on_cpu = predict(trial, rows, device_kind="cpu")
    on_cuda = predict(trial, rows, device_kind="cuda")
    assert on_cpu.peak_reserved_bytes is None
    assert on_cpu.parts["allocator"] == 0
    assert sum(on_cpu.parts.values()) == on_cpu.peak_allocated_bytes
    assert sum(on_cuda.parts.values()) == on_cuda.peak_allocated_bytes
    assert on_cuda.parts["allocator"] >= 2 * 8_519_680  # cuBLAS's two workspaces
    assert on_cuda.peak_allocated_bytes % 512 == 0
    assert on_cuda.peak_reserved_bytes is not None
    assert on_cuda.peak_reserved_bytes >= on_cuda.peak_allocated_bytes
    assert on_cuda.parts["weights"] >= on_cpu.parts["weights"]


def test_lisa_is_predicted_for_the_draw_that_takes_most(make_trial: MakeTrial) -> None:
    size = ("model=tiny_random", "model.shape.num_layers=5", "method=lisa", "method.layers=2", *MICRO)
    trials = [make_trial(*size, f"seeds.layers={seed}") for seed in (0, 1, 2, 3)]
    draws = [traced(trial, uneven_rows(trial)) for trial in trials]
    of_draws = {step.timeline.peak.total for step in draws}
    assert len(of_draws) > 1  # or the draw would not matter
    in_blocks = [
        traced_step(trial, uneven_rows(trial), model_config(trial), device_kind="cuda").timeline.peak.total
        for trial in trials
    ]
    most = predict(trials[0], uneven_rows(trials[0]), device_kind="cuda")
    assert most.peak_allocated_bytes - most.parts["allocator"] == max(in_blocks)
    # Over the periods nothing else grows: weights, states and gradients are of as many layers in every draw.
    fixed = {tuple(step.timeline.peak.parts[part] for part in ("weights", "optimizer_state")) for step in draws}
    assert len(fixed) == 1


def test_paged_states_are_outside_the_allocator(make_trial: MakeTrial) -> None:
    """bitsandbytes pages states of 100,000 elements and more: here those of the MLP's matrices, 2 x 4 bytes each."""
    size = ("model=tiny_random", "model.shape.hidden_size=256", "model.shape.mlp_size=512")
    trial = make_trial(*size, "method=full", "optimizer=paged_adamw", *MICRO)
    paged = predict(trial, uneven_rows(trial), device_kind="cuda")
    assert paged.paged_bytes == 2 * 3 * 8 * 256 * 512  # two layers, three matrices
    plain = predict(make_trial(*size, "method=full", *MICRO), uneven_rows(trial), device_kind="cuda")
    assert paged.parts["optimizer_state"] < plain.parts["optimizer_state"] - 0.9 * paged.paged_bytes
    assert any("managed memory" in note for note in paged.notes)


def test_a_model_of_unknown_shape_is_not_guessed(make_trial: MakeTrial) -> None:
    trial = make_trial("model=hub", "model.repo=someone/something", "model.name=null")
    with pytest.raises(Unpredictable, match="shape"):
        predict(trial, uneven_rows(trial), device_kind="cuda")


def test_predictions_are_kept(make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_lab.predict import predictor

    trial = make_trial(*MICRO, "rank=5")
    rows = uneven_rows(trial)
    first = predict(trial, rows, device_kind="cpu", cache=tmp_path)
    monkeypatch.setattr(predictor, "_memo", {})
    monkeypatch.setattr(predictor, "estimate", None)
    assert predict(trial, rows, device_kind="cpu", cache=tmp_path) == first
    seeds = make_trial(*MICRO, "rank=5", "seed=7", "learning_rate=0.5")
    assert predict(seeds, rows, device_kind="cpu", cache=tmp_path) == first
    (kept,) = (tmp_path / "predictions").iterdir()
    kept.write_text("{}")
    monkeypatch.setattr(predictor, "_memo", {})
    with pytest.raises(Unpredictable):  # traced anew, which cannot be here
        predict(trial, rows, device_kind="cpu", cache=tmp_path)


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("quantization=nf4", "target=all_linear"),
        ("quantization=nf4", "training.gradient_checkpointing=every_layer"),
        ("method=full",),
    ],
    ids=" ".join,
)
def test_a_measured_step_agrees_with_the_profiler(
    make_trial: MakeTrial, lines: tuple[str, ...], tmp_path: Path
) -> None:
    """PyTorch's own allocation events of a real step, on top of what was alive before it."""
    from lora_lab.train import probe

    size = ("model=tiny_random", "model.shape.hidden_size=512", "model.shape.mlp_size=1024")
    trial = make_trial(*size, *lines, *MICRO)
    rows = uneven_rows(trial)
    profiled: list[int] = []
    gather, update = probe.gather, torch.optim.AdamW.step

    class Watched:
        """Profiles from the forward pass to the end of the update."""

        def __enter__(self) -> None:
            gc.collect()  # or what earlier tests have left in circles is freed, and seen, in between
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

        def __exit__(self, *error: object) -> None:
            self.profile.__exit__(None, None, None)
            profiled.append(running_peak(allocation_deltas(self.profile)))

    watched = Watched()

    def begin(*arguments: object, **settings: object) -> object:
        watched.__enter__()
        return gather(*arguments, **settings)  # type: ignore[arg-type]

    calls: list[int] = []

    def end(*arguments: object, **settings: object) -> object:
        result = update(*arguments, **settings)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 2:  # the first call makes the states
            watched.__exit__()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "gather", begin)
        patch.setattr(torch.optim.AdamW, "step", end)
        measured = real_step(trial, rows, tmp_path)
    alive_before = sum(event.change for event in measured.timeline.events if event.place.phase == "start")
    assert profiled[0] > 1e6
    assert measured.peak_bytes - alive_before == pytest.approx(profiled[0], rel=0.02)
