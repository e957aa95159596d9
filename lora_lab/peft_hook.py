"""`import lora_lab` makes PEFT know the lab's own kinds of adapters, without importing PEFT (and torch) itself.

If PEFT is loaded already they are registered at once, else right after its own import. So plain
`PeftModel.from_pretrained(base, folder)` works for every adapter that the lab writes, and planning stays free of torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRAR = "lora_lab.adapters.peft_types"


def register_with_peft() -> None:
    """Registers now where PEFT is loaded, else when it will be. Calling it again changes nothing."""
    if "peft" in sys.modules:
        importlib.import_module(_REGISTRAR)
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Finds `peft` as everybody else would, and has it registered with once its own module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(_REGISTRAR)
