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


def gather_shared(
    cache: torch.Tensor, block_table: torch.Tensor | None, row: int, positions: torch.Tensor
) -> torch.Tensor:
    """The same positions ``[N]`` of every KV head: ``[Hkv, N, D]``."""
    if block_table is None:
        return cache[row].index_select(1, positions)
    block_size = cache.shape[1]
    blocks = block_table[row].long()[positions // block_size]
    return cache[blocks, positions % block_size].transpose(0, 1)


def gather_per_head(
    cache: torch.Tensor,
    block_table: torch.Tensor | None,
    row: int,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Positions ``[R, N]`` with ``R`` a multiple of Hkv: ``[R, N, D]``, set ``r`` from its KV head."""
    sets, selected = positions.shape
    if block_table is None:
        group = sets // cache.shape[1]
        out = cache.new_empty(sets, selected, cache.shape[3])
        for index in range(sets):
            torch.index_select(cache[row, index // group], 0, positions[index], out=out[index])
        return out
    block_size, kv_heads = cache.shape[1], cache.shape[2]
    blocks = block_table[row].long()[positions // block_size]
    heads = torch.arange(sets, device=cache.device)[:, None] // (sets // kv_heads)
    return cache[blocks, positions % block_size, heads]
