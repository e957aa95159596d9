"""A base model, ready for adapters: frozen, without a dropout of its own, in the asked precision and quantization.

Whatever the model's kind, it becomes a checked local folder first and is loaded from there in one way: safetensors
only, no remote code, PyTorch's scaled-dot-product attention. The base's own dropouts are set to 0: the lab has one
dropout setting, the adapter's, and its randomness belongs to the run; a base dropout would draw from global state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from lora_lab.errors import IdentityError, InputError, MachineError, Problem
from lora_lab.models.embedded import embedded_folder
from lora_lab.models.folders import check_model_folder
from lora_lab.models.hub import hub_folder
from lora_lab.models.packed import (
    OUTLIER_THRESHOLD,
    PackedWeights,
    is_eight_bit,
    is_four_bit,
    keep_packed_layout,
    measure_packed,
)
from lora_lab.models.quiet import quiet_transformers
from lora_lab.models.random import random_folder
from lora_lab.plan.folder import shape_from_config
from lora_lab.record.atomic import read_json
from lora_lab.schema.adaptation import Quantization
from lora_lab.schema.model import EmbeddedModel, FolderModel, HubModel, Model, RandomModel

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
)
DROPOUT_KEYS = (
    "attention_dropout",
    "hidden_dropout",
    "activation_dropout",
    "dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
)


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """`model` (frozen, on its device) and `tokenizer` are transformers' objects; `facts` go into the result.

    facts: model_folder, precision, attention, tied_embeddings, base_parameters, dropouts_set_to_0, pad_token_id,
    pad_is_eos (harmless: masks decide what counts), quantization (None, or kind, double_quantization, tensors,
    parameters, packed_bytes, constant_bytes, code_book_bytes, outlier_threshold, bits_per_parameter, all measured).
    """

    model: Any
    tokenizer: Any
    facts: dict[str, Any]


def load_base(
    model: Model, *, precision: str, quantization: Quantization, device: torch.device | str, cache: Path
) -> LoadedBase:
    """Loads `model`; `cache` is where embedded and random models are kept as folders.

    Raises:
        InputError: the folder or repository cannot be used, or tie_embeddings does not fit the model.
        IdentityError: the weights are not the declared ones.
        MachineError: network, disk, device or a missing package.
    """
    device = torch.device(device)
    _check_precision(precision, device)
    folder = model_folder(model, cache)
    config = check_model_folder(folder)
    _check_declared_shape(model, config)
    with quiet_transformers():
        tokenizer = load_tokenizer(model, folder)
        network, dropouts = _network(folder, precision=precision, quantization=quantization, device=device)
    set_embeddings(network, model)
    _fix_arithmetic(network, quantization)
    network.requires_grad_(False)
    network.config.use_cache = False
    _set_names(network, model)
    pad_is_eos = _set_padding(network, tokenizer)
    packed = measure_packed(network)
    _check_quantization(quantization, packed)
    facts = {
        "model_folder": str(folder),
        "precision": precision,
        "attention": network.config._attn_implementation,
        "tied_embeddings": is_tied(network),
        "base_parameters": sum(parameter.numel() for parameter in _plain_parameters(network))
        + (packed.parameters if packed else 0),
        "dropouts_set_to_0": dropouts,
        "pad_token_id": tokenizer.pad_token_id,
        "pad_is_eos": pad_is_eos,
        "quantization": {**asdict(packed), "bits_per_parameter": packed.bits_per_parameter} if packed else None,
    }
    return LoadedBase(network, tokenizer, facts)


def model_folder(model: Model, cache: Path) -> Path:
    """The local folder that holds the model, made or downloaded if need be; raises like `load_base`."""
    if isinstance(model, EmbeddedModel):
        return embedded_folder(model, cache)
    if isinstance(model, RandomModel):
        return random_folder(model, cache)
    if isinstance(model, HubModel):
        return hub_folder(model)
    return Path(model.path).expanduser()


def is_tied(network: Any) -> bool:
    """Whether head and token embedding are one tensor."""
    head = network.get_output_embeddings()
    return head is not None and head.weight is network.get_input_embeddings().weight


def _network(
    folder: Path, *, precision: str, quantization: Quantization, device: torch.device
) -> tuple[Any, list[str]]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    dropouts = [key for key in DROPOUT_KEYS if getattr(config, key, None)]
    for key in dropouts:
        setattr(config, key, 0.0)
    network = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=DTYPES[precision],
        quantization_config=bitsandbytes_config(quantization, DTYPES[precision]),
        device_map={"": device},
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
    )
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.p = 0.0
            dropouts.append(name)
    return network, dropouts


def load_tokenizer(model: Model, folder: Path) -> Any:
    """A folder that names no family's tokenizer is read as it is: the family's own class would add its own tokens."""
    settings = folder / "tokenizer_config.json"
    kind = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    if isinstance(model, RandomModel) or kind == "TokenizersBackend":
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """transformers' settings for a quantized base of this dtype; None where nothing is quantized."""
    if quantization.kind == "none":
        return None
    if quantization.kind == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD, llm_int8_skip_modules=["lm_head"]
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],  # transformers' name for it, also for 4-bit
    )


def _fix_arithmetic(network: Any, quantization: Quantization) -> None:
    """Quantized layers compute the same function in training and in evaluation."""
    if quantization.kind == "int8":
        from lora_lab.models.int8 import use_one_product  # imports bitsandbytes, which only quantized bases need

        use_one_product(network)
    elif quantization.kind != "none":
        keep_packed_layout(network)


def set_embeddings(network: Any, model: Model) -> None:
    """tie_embeddings=false gives the head of a tied model its own copy of the weight."""
    tied = is_tied(network)
    if model.tie_embeddings and not tied:
        raise InputError(
            Problem("model.tie_embeddings", "true would throw away the head's own weight; leave it null for this model")
        )
    if model.tie_embeddings is False and tied:
        head = network.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        network.config.tie_word_embeddings = False
        network.all_tied_weights_keys = {}


def _set_names(network: Any, model: Model) -> None:
    """What an adapter saved on this model will name as its base."""
    if isinstance(model, HubModel):
        network.name_or_path = network.config._name_or_path = model.repo


def _set_padding(network: Any, tokenizer: Any) -> bool:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(Problem("model", "its tokenizer has neither a pad nor an end-of-text token"))
        tokenizer.pad_token = tokenizer.eos_token
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(Problem("model", f"its tokenizer has {len(tokenizer)} tokens, its embedding only {rows} rows"))
    network.config.pad_token_id = tokenizer.pad_token_id
    return bool(tokenizer.pad_token_id == tokenizer.eos_token_id)


def _check_declared_shape(model: Model, config: dict[str, Any]) -> None:
    """Parameter counts and memory are planned from the declared shape, so it must be the real one."""
    real = shape_from_config(config)
    if isinstance(model, FolderModel) or model.shape is None or real is None:
        return
    declared, found = model.shape.model_dump(), real.model_dump()
    problems = [
        Problem(f"model.shape.{key}", f"declared as {declared[key]}, but the model's config.json says {found[key]}")
        for key in declared
        if declared[key] != found[key]
    ]
    if problems:
        raise IdentityError(problems)


def _check_quantization(quantization: Quantization, packed: PackedWeights | None) -> None:
    found = ("none", False) if packed is None else (packed.kind, packed.double_quantization)
    if found != (quantization.kind, quantization.double_quantization):
        raise InputError(
            Problem("quantization", f"asked for {quantization.kind}, but the loaded weights are {found[0]}")
        )


def _check_precision(precision: str, device: torch.device) -> None:
    """Refuses bf16 on a CUDA device that would only emulate it."""
    if precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise MachineError(Problem("training.precision", f"{name} has no bf16; use training.precision=fp32"))


def _plain_parameters(network: nn.Module) -> list[nn.Parameter]:
    packed = {id(module.weight) for module in network.modules() if is_four_bit(module) or is_eight_bit(module)}
    return [parameter for parameter in network.parameters() if id(parameter) not in packed]
