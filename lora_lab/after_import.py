"""Calls a function once somebody has imported a module, without importing that module here."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def after_import(name: str, action: Callable[[], object]) -> None:
    """Calls `action` now where the module is loaded, else right after its own code has run.

    A second call for the same module, before it is loaded, changes nothing. Merely asking whether the module exists
    (`importlib.util.find_spec`, as many libraries do of each other) leaves the watch in place.
    """
    if name in sys.modules:
        action()
    elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds the module as the finders behind it do, and has its loader call back."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((one for one in specs if one is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def loaded(self) -> None:
        """Ends the watch and acts."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._action()


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, watch: _Watch) -> None:
        self._loader = loader
        self._watch = watch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # what reads sources or data asks the module's own loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._watch.loaded()
