"""A key-value cache of fixed addresses, which a captured decode step can write to and read from.

transformers' own static layers hand the whole capacity to every prefill; these hand out what is filled,
so that a prefill costs what it costs with a dynamic cache.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tidaldecode.errors import TidalError


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, ``[B, Hkv, capacity, D]``."""

    is_sliding = False
    is_compileable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.stepping = False
        """Whether a decode step is running: its attention then caches new tokens by itself."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the memory, shaped like the first keys and values."""
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new tokens ``[B, Hkv, n, D]``; returns the filled part, or them alone in a decode step.

        Errors: `TidalError` where they do not fit.
        """
        if self.stepping:
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise TidalError(f"cache: expected at most {self.capacity:,} tokens, got {end:,}")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next ``query_length`` queries meet."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that are cached."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.capacity

    get_max_cache_shape = get_max_length


class FixedCache(Cache):  # type: ignore[misc]
    """A `FixedLayer` for every layer of a model."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[FixedLayer(capacity) for _ in range(num_layers)])
        self.capacity = capacity

    def fill(self, length: int) -> None:
        """Declare ``length`` tokens cached: 0 empties the cache, more than there are is a promise."""
        for layer in self.layers:
            layer.length = length

    def step(self, stepping: bool) -> None:
        """Enter or leave a decode step."""
        for layer in self.layers:
            layer.stepping = stepping
