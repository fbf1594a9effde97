"""How the PyTorch kernels read a KV cache: the same two questions for both layouts.

A cache is either strided ``[B, Hkv, S_max, D]`` or paged ``[num_blocks, block_size, Hkv, D]`` with a
block table; positions are logical in both.
"""

from __future__ import annotations

import torch


def capacity(cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Positions that one row of the cache can hold."""
    if block_table is None:
        return cache.shape[2]
    return block_table.shape[1] * cache.shape[1]


def in_rows(k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor | None) -> bool:
    """Whether a token's channels follow one another in memory, and the cache is not paged."""
    return block_table is None and k.stride(-1) == v.stride(-1) == 1


def read_range(
    cache: torch.Tensor, block_table: torch.Tensor | None, row: int, start: int, end: int
) -> torch.Tensor:
    """Positions ``start <= p < end`` of one row: ``[Hkv, end - start, D]``; a view where strided."""
    if block_table is None:
        return cache[row, :, start:end]
    block_size = cache.shape[1]
    first = start // block_size
    blocks = block_table[row, first : -(-end // block_size)].long()
    tokens = cache[blocks].flatten(0, 1)
    offset = first * block_size
    return tokens[start - offset : end - offset].transpose(0, 1)


def gather(
    cache: torch.Tensor,
    block_table: torch.Tensor | None,
    row: int,
    heads: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Selected positions of one row: ``[H, N, D]``.

    ``heads [H, 1]`` int64: the KV head that each set is read from; ``positions [H or 1, N]`` int64.
    """
    if block_table is not None:
        block_size = cache.shape[1]
        blocks = block_table[row].long()[positions // block_size]
        return cache[blocks, positions % block_size, heads]
    _, head_stride, token_stride, channel_stride = cache.stride()
    kv_heads, tokens, channels = cache.shape[1:]
    if channel_stride == 1 and token_stride == channels and head_stride % channels == 0:
        # One flat gather of whole rows is the fastest that torch has on a CPU; heads may lie apart.
        apart = head_stride // channels
        rows = cache[row].as_strided(((kv_heads - 1) * apart + tokens, channels), (channels, 1))
        flat = (heads * apart + positions).flatten()
        return rows.index_select(0, flat).view(len(heads), -1, channels)
    return cache[row][heads, positions]
