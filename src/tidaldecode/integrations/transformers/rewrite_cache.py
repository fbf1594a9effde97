"""Write anywhere into a cache of transformers: every row at its own place, over what is there.

The tensors are the host cache's own. A forward writes a window of ``n`` columns in each row and sees
everything up to it; what is not released to the host never was in its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.growing_cache import GrowingLayer

_GROWTH = 1.25
"""A dynamic layer is given more room than asked for, so that it is seldom copied."""


@dataclass(frozen=True)
class Window:
    """Where one forward writes, and what its queries see."""

    columns: torch.Tensor
    """``[B, n]`` int64: where the tokens go; those that do not fit are at the last column."""
    room: torch.Tensor | None
    """``[B]`` int64: index of the token that the last column is for, -1 where it is taken; None if all
    tokens fit."""
    extent: int
    """Columns that the layers hand to attention."""

    def mask(self, starts: torch.Tensor) -> torch.Tensor:
        """``[B, 1, n, extent]`` bool: a token sees its row from ``starts [B]`` to itself."""
        column = torch.arange(self.extent, device=self.columns.device)
        seen = column <= self.columns[..., None]
        return (seen & (column >= starts[:, None, None]))[:, None]


class RewriteLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, ``[B, Hkv, at least extent, D]``, shared with the host's layer."""

    is_sliding = False
    is_compileable = False

    def __init__(self, host: DynamicLayer | StaticLayer) -> None:
        super().__init__()
        self.host = host
        self.keys, self.values = host.keys, host.values
        self.dtype, self.device = host.keys.dtype, host.keys.device
        self.is_initialized = True
        self.window: Window | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the host's layer has the memory."""

    def reserve(self, columns: int, limit: int) -> None:
        """Have room for so many columns, and never for more than ``limit``; a dynamic layer grows."""
        held = self.keys.shape[2]
        if columns <= held:
            return
        length = self.host.get_seq_length()
        size = min(int(columns * _GROWTH), limit)
        grown = []
        for states in (self.keys, self.values):
            room = states.new_zeros(*states.shape[:2], size, states.shape[3])
            room[:, :, :held] = states
            grown.append(room)
        self.keys, self.values = grown
        # The host goes on showing its own tokens, and the old memory is given back.
        self.host.keys, self.host.values = (states[:, :, :length] for states in grown)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write tokens ``[B, Hkv, n, D]`` into the window; returns all columns up to its extent."""
        assert self.window is not None
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            _write(states, new, self.window)
        extent = self.window.extent
        return self.keys[:, :, :extent], self.values[:, :, :extent]

    def release(self, length: int) -> None:
        """Leave the first ``length`` columns to the host, and nothing of the others."""
        if isinstance(self.host, StaticLayer):
            self.keys[:, :, length:] = 0
            self.values[:, :, length:] = 0
            self.host.cumulative_length.fill_(length)
        else:
            self.host.keys, self.host.values = self.keys[:, :, :length], self.values[:, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the queries meet."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns before the window, where rows differ those of the longest."""
        return 0 if self.window is None else self.window.extent - self.window.columns.shape[1]

    def get_max_length(self) -> int:
        """Columns there are room for."""
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length


class RewriteCache(Cache):  # type: ignore[misc]
    """A `RewriteLayer` over every layer of ``host``, which stays the owner.

    Args:
        host: a filled cache.
        limit: columns that will ever be written; by default those that are filled.

    Errors: `TidalError` for a cache that cannot be rewritten, or that is too small.
    """

    def __init__(self, host: Cache, limit: int | None = None) -> None:
        check_rewritable(host)
        super().__init__(layers=[RewriteLayer(layer) for layer in host.layers])
        self.host_length = int(host.get_seq_length())
        self.limit = self.host_length if limit is None else limit
        for layer in self.layers:
            if isinstance(layer.host, StaticLayer) and layer.get_max_length() < self.limit:
                raise TidalError(
                    f"cache: expected room for {self.limit:,} tokens, got a static cache of "
                    f"{layer.get_max_length():,}; make it with max_cache_len={self.limit}"
                )

    def open(self, begins: torch.Tensor, length: int, longest: int) -> Window:
        """The window of the next forward: ``length`` columns of each row from ``begins [B]`` on.

        ``longest`` is the largest of ``begins``, which the host knows. Tokens behind ``limit`` are
        not written.
        """
        offsets = torch.arange(length, device=begins.device)
        room = None
        if longest + length > self.limit:
            room = self.limit - 1 - begins
        columns = (begins[:, None] + offsets).clamp(max=self.limit - 1)
        window = Window(columns, room, min(longest + length, self.limit))
        for layer in self.layers:
            layer.reserve(window.extent, self.limit)
            layer.window = window
        return window

    def release(self, length: int) -> None:
        """Leave the first ``length`` columns to the host, and nothing of the others."""
        for layer in self.layers:
            layer.release(length)


def check_rewritable(cache: Cache) -> None:
    """Errors: `TidalError` for a cache in which earlier tokens cannot be overwritten."""
    known = (DynamicLayer, GrowingLayer, StaticLayer)
    found = {type(layer).__name__ for layer in cache.layers if type(layer) not in known}
    if getattr(cache, "offloading", False):
        found.add("offloading")
    if type(cache).__name__ not in ("DynamicCache", "StaticCache", "Cache") or found:
        what = ", ".join(sorted(found)) or "other layers"
        raise TidalError(
            "cache: expected a DynamicCache or StaticCache with full attention, in which earlier "
            f"tokens can be overwritten, got {type(cache).__name__} with {what}; leave past_key_values "
            "and cache_implementation out"
        )


def _write(states: torch.Tensor, new: torch.Tensor, window: Window) -> None:
    """Put ``new [B, Hkv, n, D]`` into the window's columns of ``states``."""
    columns = window.columns.to(states.device)
    batch, heads, length, size = new.shape
    index = columns[:, None, :, None].expand(batch, heads, length, size)
    if window.room is not None:
        # Several tokens point at the last column: all of them write what belongs there.
        offsets = torch.arange(length, device=states.device)
        source = torch.minimum(offsets, window.room.to(states.device)[:, None])
        wanted = source[:, None, :, None].expand(batch, heads, length, size)
        new = torch.where(wanted < 0, states.gather(2, index), new.gather(2, wanted.clamp(min=0)))
    states.scatter_(2, index, new)
