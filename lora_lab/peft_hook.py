"""`import lora_lab` makes PEFT know the lab's own kinds of adapters, without importing PEFT (and torch) itself.

If PEFT is loaded already they are registered at once, else right after its own import. So plain
`PeftModel.from_pretrained(base, folder)` works for every adapter that the lab writes, and planning stays free of torch.
"""

from __future__ import annotations

import importlib

from lora_lab.after_import import after_import

_REGISTRAR = "lora_lab.adapters.peft_types"


def register_with_peft() -> None:
    """Registers now where PEFT is loaded, else when it will be. Calling it again changes nothing."""
    after_import("peft", lambda: importlib.import_module(_REGISTRAR))
