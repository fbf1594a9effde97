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
    """Keys and values of one layer, ``[B, Hkv, capacity, D]``.

    Args:
        capacity: tokens that fit.
        position: ``[1]`` int64 on the device: where a decode step writes.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, capacity: int, position: torch.Tensor) -> None:
        super().__init__()
        self.capacity, self._position = capacity, position
        self.length = 0
        self.stepping = False
        """Whether a decode step is running: it writes at ``position`` and gets the whole capacity."""

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
        """Add new tokens ``[B, Hkv, n, D]``; returns the filled part, or all of it in a decode step.

        Errors: `TidalError` where they do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.stepping:
            self.keys.index_copy_(2, self._position, key_states)
            self.values.index_copy_(2, self._position, value_states)
            return self.keys, self.values
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
    """`FixedLayer`s that share the position at which a decode step writes."""

    def __init__(self, num_layers: int, capacity: int, device: torch.device) -> None:
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        super().__init__(layers=[FixedLayer(capacity, self.position) for _ in range(num_layers)])
        self.capacity = capacity

    def fill(self, length: int) -> None:
        """Declare ``length`` tokens cached: 0 empties the cache, more than there are is a promise."""
        for layer in self.layers:
            layer.length = length
        self.position.fill_(length)

    def step(self, stepping: bool) -> None:
        """Enter or leave a decode step."""
        for layer in self.layers:
            layer.stepping = stepping
