"""What only a CUDA device can show. Run by `pytest -m gpu`; nothing here has been run where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lab.memory.meter import MemoryMeter, memory_now
from lora_lab.models.load import load_base
from lora_lab.schema.adaptation import Quantization
from tests.conftest import MakeTrial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def test_the_allocators_peaks_are_read_by_phase() -> None:
    meter = MemoryMeter(CUDA)
    with meter.phase("train"):
        block = torch.zeros(64 * 1024 * 1024, device=CUDA)
        del block
    with meter.phase("evaluate"):
        pass
    assert meter.measurements["train_peak_allocated_bytes"] >= 256 * 1024 * 1024
    assert meter.measurements["train_peak_reserved_bytes"] >= meter.measurements["train_peak_allocated_bytes"]
    assert meter.measurements["evaluate_peak_allocated_bytes"] < 256 * 1024 * 1024
    assert set(memory_now(CUDA)) == {"allocated_bytes", "reserved_bytes"}


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_the_same_logits_as_on_the_cpu(make_trial: MakeTrial, cache: Path, kind: str) -> None:
    quantization = Quantization(kind=kind, double_quantization=False)  # type: ignore[arg-type]
    model = make_trial().model
    ids = torch.arange(32)[None]
    logits = []
    for device in (torch.device("cpu"), CUDA):
        base = load_base(model, precision="fp32", quantization=quantization, device=device, cache=cache)
        with torch.inference_mode():
            logits.append(base.model(input_ids=ids.to(device)).logits.cpu())
    assert torch.allclose(*logits, atol=1e-3)
