"""Keys and values of a prefix that all rows share: held once, seen by every row, never written to by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers' cache classes are untyped
    """keys, values: [1, heads, prefix, head size]."""

    is_initialized: bool
    keeping = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (states[:1, :, :0] for states in (key_states, value_states))
            self.is_initialized = True
        keys, values = _behind(self.keys, key_states), _behind(self.values, value_states)
        if self.keeping:
            self.keys, self.values = keys, values
        return keys, values


class PrefixCache(Cache):  # type: ignore[misc]
    """A cache of plain attention layers that grows only inside `keep=True` calls, and is read by rows of any number.

    transformers' own `DynamicCache` would keep what every call adds, repeated over its rows.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_PrefixLayer)
        self._keeping = False

    @classmethod
    def holding(cls, layers: Sequence[tuple[Tensor, Tensor]]) -> PrefixCache:
        """With these keys and values per layer, each [1, heads, prefix, head size]."""
        cache = cls()
        with cache.keep():
            for index, (keys, values) in enumerate(layers):
                cache.update(keys, values, index)
        return cache

    def keep(self) -> _Keeping:
        """Within the block, calls with one row extend the prefix."""
        return _Keeping(self)

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return int(self.layers[0].get_seq_length()) if self.layers else 0

    def cut(self, length: int) -> None:
        """Shortens the prefix to `length` tokens."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' interface: the layer's keys and values with the prefix in front, [rows, heads, ..., size].

        Raises:
            ValueError: several rows at once are to extend the prefix.
        """
        if self._keeping and len(key_states) != 1:
            raise ValueError(f"one row extends a prefix, got {len(key_states)}")
        while len(self.layers) <= layer_idx:
            self.layers.append(_PrefixLayer())
        self.layers[layer_idx].keeping = self._keeping
        states: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states, *args, **settings)
        return states


class _Keeping:
    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    def __enter__(self) -> None:
        self._cache._keeping = True

    def __exit__(self, *_: object) -> None:
        self._cache._keeping = False


def _behind(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat((prefix.expand(len(states), -1, -1, -1), states), dim=-2)
