"""LoRA Lab: experiment sweeps about fine-tuning, with error bars, time and memory in a local ledger."""

__version__ = "0.1.0"
