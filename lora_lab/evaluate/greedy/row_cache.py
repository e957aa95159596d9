"""Keys and values of a batch of rows that grow in place, start from a shared prefix, and let rows go.

transformers' `DynamicLayer` copies all it holds for every token. Here a layer holds room for more and writes into it:
one copy every `ROOM` tokens. Keys carry their positions already, so a prefix that was computed once may stand behind
any number of padding columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Columns added when a layer is full: a sixty-fourth of the copies, and at most that many columns unused.
ROOM = 64


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers' caches are untyped
    """A layer of plain keys and values, [rows, heads, columns, head size], with room behind the last column."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._stores: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_settings: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, views that end with the new ones; same shapes as in `DynamicLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._stores is None or self._stores[0].shape[-2] < end:
            self._stores = (
                _with_room(key_states, self.keys if start else None, end + ROOM),
                _with_room(value_states, self.values if start else None, end + ROOM),
            )
        keys, values = self._stores
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def keep(self, rows: Tensor, first: int) -> None:
        """Lets go of all rows but `rows` and of the columns before `first`."""
        if self._stores is None:
            return
        columns = self.get_seq_length() - first
        keys, values = (store[rows, :, first:] for store in self._stores)
        self._stores = (keys, values)
        self.keys, self.values = keys[..., :columns, :], values[..., :columns, :]


def roomy_cache(prefix: DynamicCache | None, pads: Sequence[int], columns: int) -> DynamicCache:
    """A cache for len(pads) rows whose first `columns` columns are filled.

    Row r gets `pads[r]` empty columns and behind them the beginning of `prefix` (a cache of one row with at least
    `columns` columns). columns=0: an empty cache, and no prefix is needed.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = RoomyLayer
    if columns == 0 or prefix is None:
        return cache
    for index, layer in enumerate(prefix.layers):
        if layer.get_seq_length() > 0:
            cache.update(_placed(layer.keys, pads, columns), _placed(layer.values, pads, columns), index)
    return cache


def one_row(cache: DynamicCache, row: int, columns: int) -> DynamicCache:
    """A copy of the first `columns` columns of a row that has no padding, as a plain cache."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        if layer.get_seq_length() > 0:
            keys, values = (states[row : row + 1, :, :columns].clone() for states in (layer.keys, layer.values))
            copy.update(keys, values, index)
    return copy


def keep_rows(cache: DynamicCache, rows: Tensor, first: int) -> None:
    """Lets go of all rows of a `roomy_cache` but `rows` (indices) and of the columns before `first`."""
    for layer in cache.layers:
        layer.keep(rows, first)


def _with_room(new: Tensor, old: Tensor | None, columns: int) -> Tensor:
    store = new.new_zeros((*new.shape[:-2], columns, new.shape[-1]))
    if old is not None:
        store[..., : old.shape[-2], :] = old
    return store


def _placed(states: Tensor, pads: Sequence[int], columns: int) -> Tensor:
    rows = states.new_zeros((len(pads), states.shape[1], columns, states.shape[-1]))
    for row, pad in zip(rows, pads, strict=True):
        if pad < columns:
            row[:, pad:] = states[0, :, : columns - pad]
    return rows
