"""The other sides: transformers' Trainer with PEFT, and TRL's SFTTrainer, each set up as their users do.

Only what a run asks for is given (rank, targets, rate, batch, steps, float32 on the CPU); all else is the library's
default. Rows come as tokens with labels on the answers, so that all sides read the same and none is timed tokenising.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

if TYPE_CHECKING:
    from lora_lab.data.encode import Encoded

NO_LOSS = -100
# PEFT's names for the targets, in models of the Llama family.
MODULES = {
    "qv": ["q_proj", "v_proj"],
    "all_linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def plain_model(folder: Path, target: str, *, rank: int, alpha: float, seed: int) -> Any:
    """A PeftModel in float32 on the base of `folder`; initial weights follow from `seed`."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    return get_peft_model(base, lora_config(target, rank=rank, alpha=alpha))


def lora_config(target: str, *, rank: int, alpha: float) -> LoraConfig:
    """PEFT's LoRA with its defaults but for these."""
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=MODULES[target], task_type="CAUSAL_LM")


def examples_of(rows: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """Columns `input_ids`, `attention_mask` and `labels`; a label of -100 carries no loss."""
    return [
        {
            "input_ids": list(row.input_ids),
            "attention_mask": [1] * len(row.input_ids),
            "labels": [
                token if counts else NO_LOSS for token, counts in zip(row.input_ids, row.loss_mask, strict=True)
            ],
        }
        for row in rows
    ]


def arguments(
    output: Path, *, batch: int, micro_batch: int, steps: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    """What both trainers are told: of TrainingArguments, and SFTConfig, which is one of them."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch // micro_batch,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def plain_trainer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Mapping[str, Any]],
    told: dict[str, Any],
    *,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    """transformers' Trainer on batches that are padded to their longest row."""
    return kind(
        model=model,
        args=TrainingArguments(**told),
        train_dataset=Dataset.from_list(list(examples)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS),
    )


def trl_trainer(
    folder: Path,
    tokenizer: Any,
    examples: Sequence[Mapping[str, Any]],
    told: dict[str, Any],
    *,
    lora: LoraConfig,
    keep: bool,
) -> Any:
    """TRL's SFTTrainer: loss on completions, no packing, its own collator and chunked loss.

    keep: activations are kept for the backward pass, which its default, gradient checkpointing, does not.
    """
    trl: Any = importlib.import_module("trl")
    own = {} if not keep else {"gradient_checkpointing": False}
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # float32 is asked for: its default is bfloat16.
    return counting(trl.SFTTrainer)(
        model=network,
        args=trl.SFTConfig(**told, **own, bf16=False),
        train_dataset=Dataset.from_list(list(examples)),
        processing_class=tokenizer,
        peft_config=lora,
    )


def why_no_trl() -> str | None:
    """Why TRL cannot take part here, or None."""
    if importlib.util.find_spec("trl") is None:
        return "TRL is not installed (pip install -c constraints.txt trl)"
    try:
        importlib.import_module("trl").SFTTrainer  # noqa: B018  # imported when it is named
    except Exception as error:  # noqa: BLE001 - another library's import may fail in any way, and is then left out
        return f"TRL does not work with transformers {transformers.__version__}: {type(error).__name__}: {error}"
    return None


def counting(kind: type[Any]) -> type[Any]:
    """The trainer class, counting in `real_tokens` what it trains on, without padding."""

    class Counting(kind):  # type: ignore[misc]
        real_tokens = 0

        def training_step(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
            self.real_tokens += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **settings)

    return Counting


class AtEachStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Calls `told` after each optimizer step; training ends where it says so by returning False."""

    def __init__(self, told: Callable[[], bool]) -> None:
        self._told = told

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **about: Any) -> TrainerControl:
        """One step is through."""
        control.should_training_stop = control.should_training_stop or not self._told()
        return control
