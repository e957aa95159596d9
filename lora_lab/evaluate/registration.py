"""`import lora_lab.evaluate` gives lm-eval the model name `lora_lab`, without importing lm-eval (or torch) itself.

Planning imports `lora_lab.evaluate.check`. There, a plain import of lm-eval's registry would cost 2 ms, would fail
where lm-eval is not installed (which is said kindly elsewhere), and would set HF_XET_HIGH_PERFORMANCE in the
environment. So the name is registered when somebody else loads lm-eval's registry: at once where it is loaded already.

lm-eval reads its own list of models only while the registry is empty. `lora_lab` alone in it would hide `hf` and all
others, so that list is read first; it holds names only.
"""

from __future__ import annotations

import importlib

from lora_lab.after_import import after_import

MODEL_NAME = "lora_lab"
_TARGET = "lora_lab.evaluate.lab_model:LabModel"  # lm-eval imports it when the model is asked for


def register_with_lm_eval() -> None:
    """Registers now where lm-eval's registry is loaded, else when it will be. Calling it again changes nothing."""
    after_import("lm_eval.api.registry", _register)


def _register() -> None:
    importlib.import_module("lm_eval.models")
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=_TARGET)
