"""Bases that the tests of the lab's own PEFT tuners put adapters on, and what they compare on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_lab.models.packed import keep_packed_layout
from lora_lab.models.random import random_network
from lora_lab.schema.model import Shape
from tests.conftest import CHECKOUT

FAMILIES = ["llama", "mistral", "qwen2", "gpt2"]
IDS = torch.arange(24).reshape(2, 12)

# A process that knows the lab by its name only. The logits of the saved adapter on the saved base go to argv[3].
_FRESH = """
import sys
import lora_lab
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
save_file({"logits": model(input_ids=torch.arange(24).reshape(2, 12)).logits.detach()}, sys.argv[3])
"""


def shape(family: str, *, layers: int = 2, **sizes: int) -> Shape:
    """Query heads in groups of two per key head where the family has that; all widths fit 4-bit blocks of 64."""
    fields = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4 if family == "gpt2" else 2, "head_dim": 16}
    fields |= {"mlp_size": 128, "num_layers": layers, "vocab_size": 260, "max_positions": 64}
    return Shape.model_validate({"family": family, "tied_embeddings": False, **fields, **sizes})


def network(family: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A random causal LM in eval mode; set up as the lab does: no dropouts of its own (GPT-2 has some), no cache."""
    model = random_network(shape(family, **sizes), 0).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model


def quantized(family: str, kind: str, dtype: torch.dtype, folder: Path) -> Any:
    """The same network with its linear layers in bitsandbytes' nf4 or int8; `folder` takes its files."""
    network(family).save_pretrained(folder)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings)
    )
    keep_packed_layout(model)
    return model.eval()


def shaken(model: Any, amount: float = 0.1) -> Any:
    """Trained, for the purposes of a test: every weight that can be trained has moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (amount * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def trained_names(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_and_gradients(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the gradient of their mean square for each weight that can be trained."""
    logits = model(input_ids=ids).logits
    parameters = list(trained_names(model).values())
    return logits.detach(), list(torch.autograd.grad(logits.double().square().mean(), parameters))


def close(left: list[torch.Tensor], right: list[torch.Tensor], *, atol: float) -> None:
    """Element by element; `atol` is relative to the largest element of each pair."""
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol * max(1e-30, float(other.abs().max())))


def same(left: tuple[torch.Tensor, list[torch.Tensor]], right: tuple[torch.Tensor, list[torch.Tensor]]) -> bool:
    """Whether logits and gradients are equal to the last bit."""
    pairs = zip([left[0], *left[1]], [right[0], *right[1]], strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def fresh_logits(base: Any, model: Any, folder: Path) -> torch.Tensor:
    """Logits of `model`, saved and loaded by plain PEFT in another process that has imported nothing but `lora_lab`."""
    base.save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    run_python(_FRESH, str(folder / "base"), str(folder / "adapter"), str(folder / "logits.safetensors"))
    return load_file(folder / "logits.safetensors")["logits"]


def run_python(code: str, *arguments: str) -> str:
    """Output of `code`, run in a process of its own from the root of the checkout; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
