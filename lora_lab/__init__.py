"""LoRA Lab: experiment sweeps about fine-tuning, with error bars, time and memory in a local ledger."""

import logging

from lora_lab.peft_hook import register_with_peft

__version__ = "0.1.0"

# At import bitsandbytes tells everybody that an optional kernel from a hub is not installed; nobody here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

register_with_peft()
