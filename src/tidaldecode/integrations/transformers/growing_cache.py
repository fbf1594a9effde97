"""transformers' dynamic cache, grown in place: a decode step writes its token and copies no other.

The host's own layer concatenates, which reads and writes the whole cache once a step: several times what
a sparse step reads.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM, _MOST_ROOM = 128, 1024
"""Tokens that there is room for behind those of a layer that was copied: an eighth, within bounds."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A dynamic layer whose keys and values are the beginning of memory with room for more tokens."""

    _memory: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def over(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer to take the place of ``layer``, with its tensors."""
        grown = cls.__new__(cls)
        grown.__dict__.update(layer.__dict__)
        return grown

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens ``[B, Hkv, n, D]``; returns all, views of the layer's memory."""
        if key_states.requires_grad or value_states.requires_grad or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = int(self.get_seq_length())
        end = length + key_states.shape[2]
        if not self._has_room(end):
            self._memory = self._moved(key_states, value_states, length, end)
        assert self._memory is not None
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, length:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens, and the memory."""
        self._memory = None
        super().reset()

    def _has_room(self, end: int) -> bool:
        """Whether the tokens still lie where this layer put them, with room for those up to ``end``."""
        if self._memory is None:
            return False
        return all(
            states is not None
            and states.data_ptr() == memory.data_ptr()
            and states.stride() == memory.stride()
            and states.shape[:2] == memory.shape[:2]
            and end <= memory.shape[2]
            # What inference mode made, nothing else may write to.
            and (not memory.is_inference() or torch.is_inference_mode_enabled())
            for memory, states in zip(self._memory, (self.keys, self.values), strict=True)
        )

    def _moved(
        self, key_states: torch.Tensor, value_states: torch.Tensor, length: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New memory that holds what is cached, with room for more than ``end`` tokens."""
        capacity = end + min(max(end // 8, _LEAST_ROOM), _MOST_ROOM)
        moved = []
        for cached, states in ((self.keys, key_states), (self.values, value_states)):
            memory = states.new_empty(*states.shape[:2], capacity, states.shape[3])
            if length:
                memory[:, :, :length] = cached
            moved.append(memory)
        return moved[0], moved[1]


def grow_in_place(cache: Cache | None) -> None:
    """Let the dynamic layers of a `DynamicCache` grow in place; any other cache stays as it is."""
    if cache is None or type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer.over(layer)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
