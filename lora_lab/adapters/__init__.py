"""Adapters on a model. PEFT is told of the lab's own kinds before any file of theirs is run: each of them imports PEFT,
and that import (`lora_lab.peft_hook`) asks for all of them whole."""

import lora_lab.adapters.peft_types  # noqa: F401
