"""Live bytes counted per operation, against torch.profiler's allocation events and against arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_lab.memory.live_bytes import LiveBytes, storage_bytes
from lora_lab.memory.meter import MemoryMeter, memory_now
from lora_lab.optim.optimizers import build_optimizer, state_tensors
from tests.conftest import MakeTrial
from tests.parity.test_train_loop import build_member
from tests.stepping import probe_alone

CPU = torch.device("cpu")


def allocation_deltas(prof: profile) -> list[int]:
    """Every allocation (positive) and free (negative) the profiler saw, in order of time."""
    records = []

    def walk(event: object) -> None:
        if event.name == "[memory]":  # type: ignore[attr-defined]
            records.append((event.start_time_ns, event.extra_fields.alloc_size))  # type: ignore[attr-defined]
        for child in event.children:  # type: ignore[attr-defined]
            walk(child)

    for root in prof.profiler.kineto_results.experimental_event_tree():  # type: ignore[union-attr]
        walk(root)
    return [size for _, size in sorted(records, key=lambda record: record[0])]


def running_peak(deltas: list[int]) -> int:
    live = peak = 0
    for delta in deltas:
        live += delta
        peak = max(peak, live)
    return peak


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_agrees_with_the_profiler() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)], nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(512, 256)
    a_step(model, optimizer, x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        a_step(model, optimizer, x)
    expected = running_peak(allocation_deltas(prof))
    assert expected > 1e6  # or the profiler has told nothing
    there_already = [*model.parameters(), *state_tensors(optimizer), x]
    with LiveBytes([("weights", there_already)]) as counter:
        a_step(model, optimizer, x)
    assert counter.peak_bytes - storage_bytes(there_already) == pytest.approx(expected, rel=0.02)


def test_counts_a_storage_once_and_lets_it_go() -> None:
    x = torch.zeros(1000)
    with LiveBytes([("weights", [x, x[10:]])]) as counter:
        assert counter.live_bytes == 4000
        y = x + 1
        view = y[5:]
        assert counter.live_bytes == 8000
        del y
        assert counter.live_bytes == 8000  # the view keeps the storage
        del view
        assert counter.live_bytes == 4000
    assert counter.peak_bytes == 8000


def test_probe_changes_nothing_and_sees_checkpointing(make_trial: MakeTrial, cache: Path) -> None:
    shape = ("model.shape.num_layers=8", "training.max_steps=2")
    plain, plain_member = build_member(make_trial(*shape), cache)
    saved, saved_member = build_member(make_trial(*shape, "training.gradient_checkpointing=sqrt"), cache)
    before = [parameter.detach().clone() for parameter in plain_member.parameters]
    probe = probe_alone(plain, plain_member)
    peak = probe.peak_bytes
    assert all(torch.equal(a, b) for a, b in zip(before, plain_member.parameters, strict=True))
    assert not plain_member.optimizer.state
    assert plain_member.step == 0
    assert all(parameter.grad is None for parameter in plain_member.parameters)
    weights = storage_bytes(plain.parameters())
    adapter = storage_bytes(plain_member.parameters)
    assert probe.gradient_bytes == adapter
    assert peak > weights + 3 * adapter  # gradients and two AdamW states come on top of the weights
    assert probe_alone(saved, saved_member).peak_bytes < 0.7 * peak


@pytest.mark.parametrize(("kind", "bytes_per_parameter"), [("adamw", 8), ("sgd", 4), ("lion", 4), ("paged_adamw", 8)])
def test_optimizer_state_bytes(make_trial: MakeTrial, kind: str, bytes_per_parameter: int) -> None:
    parameter = nn.Parameter(torch.randn(64, 256))
    optimizer = build_optimizer(make_trial(f"optimizer={kind}").optimizer, [parameter], learning_rate=1e-3)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = [tensor for tensor in state_tensors(optimizer) if tensor.numel() > 1]
    assert storage_bytes(states) == bytes_per_parameter * parameter.numel()


def test_eight_bit_state_bytes(make_trial: MakeTrial) -> None:
    """Two states of one byte, one fp32 constant per 256 of each, two code books of 256 fp32 (Dettmers et al. 2022)."""
    parameter = nn.Parameter(torch.randn(64, 256))
    optimizer = build_optimizer(make_trial("optimizer=adamw8bit").optimizer, [parameter], learning_rate=1e-3)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    n = parameter.numel()
    assert storage_bytes(state_tensors(optimizer)) == 2 * n + 2 * 4 * n // 256 + 2 * 4 * 256


def test_meter_names_what_it_measured() -> None:
    meter = MemoryMeter(CPU)
    with meter.phase("load"):
        block = torch.zeros(30_000_000)
    now = memory_now(CPU)
    assert set(now) == {"rss_bytes"}
    assert now["rss_bytes"] > 120_000_000
    if "load_peak_rss_bytes" in meter.missing:
        pytest.skip(meter.missing["load_peak_rss_bytes"])
    assert meter.measurements["load_peak_rss_bytes"] > block.untyped_storage().nbytes()
    assert "load_peak_reserved_bytes" in meter.missing
    del block
    with meter.phase("train"):
        pass
    assert meter.measurements["train_peak_rss_bytes"] < meter.measurements["load_peak_rss_bytes"]
