"""The key-value cache of transformers' models: how it is handed over, and one that grows without copying."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ROOM = 32  # columns that a growing cache makes at once


@functools.lru_cache(maxsize=32)
def _cache_argument(forward: Callable[..., Any]) -> str:
    """``cache`` since transformers 5.24, which will drop ``past_key_values`` in 5.40; 4.57 knows only the latter."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def call_with_cache(model: nn.Module, cache: Any, **inputs: Any) -> Any:
    """``model(**inputs)`` that reads and extends ``cache`` in place, whatever this transformers calls the argument."""
    return model(**{_cache_argument(type(model).forward): cache}, use_cache=True, **inputs)


@functools.cache
def _growing_cache_class() -> Callable[[], Any]:
    from transformers.cache_utils import Cache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        room: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
                self.keys, self.values = key_states, value_states
                return key_states, value_states
            assert self.keys is not None and self.values is not None
            old, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
            # Where rows or columns were taken out, keys and values are no longer a part of the room.
            room = self.room
            if room is None or self.keys.data_ptr() != room[0].data_ptr() or end > room[0].shape[2]:
                self.room = room = self._widened(self.keys, end), self._widened(self.values, end)
            room[0][:, :, old:end], room[1][:, :, old:end] = key_states, value_states
            self.keys, self.values = room[0][:, :, :end], room[1][:, :, :end]
            return self.keys, self.values

        @staticmethod
        def _widened(x: Tensor, end: int) -> Tensor:
            wide = x.new_empty(*x.shape[:2], end + ROOM, x.shape[3])
            wide[:, :, : x.shape[2]] = x
            return wide

    return functools.partial(Cache, layer_class_to_replicate=GrowingLayer)


def new_cache() -> Any:
    """An empty cache of a decoder, with room to grow; ``DynamicCache`` copies all that it holds at each step."""
    return _growing_cache_class()()
