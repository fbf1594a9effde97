"""transformers' dynamic cache, grown in place: a decode step writes its token and copies no other.

The host's own layer concatenates, which reads and writes the whole cache once a step: several times what
a sparse step reads.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM, _MOST_ROOM = 128, 1024
"""Tokens that there is room for behind those of a layer that was copied: an eighth, within bounds."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A dynamic layer whose keys and values lie at the beginning of memory with room for more tokens.

    Nothing that was ever shown is overwritten. The room is used only while the layer holds the very
    tensors that it showed last; cropped, reordered or exchanged ones are copied to new memory first.
    """

    _shown: tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]] | None = None
    _capacity = 0
    """Tokens that the memory of what was shown last has room for."""

    @classmethod
    def over(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer to take the place of ``layer``, with its tensors."""
        grown = cls.__new__(cls)
        grown.__dict__.update(layer.__dict__)
        return grown

    def __getstate__(self) -> dict[str, Any]:
        """A copy shares no room with its original."""
        return {name: value for name, value in self.__dict__.items() if name != "_shown"}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens ``[B, Hkv, n, D]``; returns all, views of the layer's memory.

        With gradients, while compiling, and for tokens unlike those cached, it does what the host does.
        """
        new = (key_states, value_states)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._is_like(new):
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = int(self.get_seq_length())
        end = length + key_states.shape[2]
        memories = self._memories() if self._has_room(end) else self._moved(new, length, end)
        for memory, states in zip(memories, new, strict=True):
            memory[:, :, length:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in memories)
        self._shown = weakref.ref(self.keys), weakref.ref(self.values)
        return self.keys, self.values

    def _is_like(self, new: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether new tokens have the rows, heads, sizes and kind of numbers of those cached."""
        if not self.is_initialized or self.get_seq_length() == 0:
            return True
        return all(
            (cached.shape[:2], cached.shape[3], cached.dtype, cached.device)
            == (states.shape[:2], states.shape[3], states.dtype, states.device)
            for cached, states in zip((self.keys, self.values), new, strict=True)
        )

    def _has_room(self, end: int) -> bool:
        """Whether the layer holds what it showed last, with room behind for tokens up to ``end``."""
        held = (self.keys, self.values)
        if self._shown is None or end > self._capacity:
            return False
        if any(shown() is not states for shown, states in zip(self._shown, held, strict=True)):
            return False
        # What inference mode made, nothing else may write to.
        return torch.is_inference_mode_enabled() or not held[0].is_inference()

    def _memories(self) -> list[torch.Tensor]:
        """The memory of keys and values, room included."""
        return [
            states.as_strided((*states.shape[:2], self._capacity, states.shape[3]), states.stride())
            for states in (self.keys, self.values)
        ]

    def _moved(
        self, new: tuple[torch.Tensor, torch.Tensor], length: int, end: int
    ) -> list[torch.Tensor]:
        """New memory that holds what is cached, with room for more than ``end`` tokens."""
        self._capacity = end + min(max(end // 8, _LEAST_ROOM), _MOST_ROOM)
        memories = []
        for cached, states in zip((self.keys, self.values), new, strict=True):
            memory = states.new_empty(*states.shape[:2], self._capacity, states.shape[3])
            if length:
                memory[:, :, :length] = cached
            memories.append(memory)
        return memories


def grow_in_place(cache: Cache | None) -> None:
    """Let the dynamic layers of a `DynamicCache` grow in place; any other cache stays as it is."""
    if cache is None or type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer.over(layer)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
