"""What only a CUDA device can show. Run by `pytest -m gpu`; nothing here has been run where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from lora_lab.evaluate.lab_model import LabModel
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_tree_scores_what_lm_eval_scores(make_trial: MakeTrial, cache: Path, precision: str) -> None:
    """Prefix cache, masks and answers on the device; the guard compares, in bf16 with lm-eval's own spread."""
    none = Quantization(kind="none", double_quantization=False)
    base = load_base(make_trial().model, precision=precision, quantization=none, device=CUDA, cache=cache)
    lm = LabModel(base.model, tokenizer=base.tokenizer, batch_size=8)
    texts = [(f"Q: one and one? A: two\nQ: {place}?", answer) for place in range(40) for answer in (" a", " no one")]
    lm.loglikelihood([Instance("loglikelihood", {}, text, place, ("t", place, 1)) for place, text in enumerate(texts)])
    (facts,) = lm.engine_facts
    assert facts["engine"] == "tree" and facts["guard"]["requests"] == 64
