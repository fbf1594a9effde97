"""Where a token's keys and values lie: the same addresses for strided and paged caches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROW_ARGUMENTS = ["seq_lens", "starts", "whole_lens", "block_table"]
"""Arguments of kernels that have something for each row, for their ``do_not_specialize_on_alignment``.

They may be those of some rows of a batch, at any address: no kernel is compiled anew for that.
"""


@triton.jit
def token_offsets(
    positions,
    row,
    head,
    wanted,
    block_table,
    table_stride,
    block_size,
    stride_row,
    stride_head,
    stride_token,
    PAGED: tl.constexpr,
):
    """Offsets (int64) of ``positions [BLOCK]`` of one row and KV head; those not ``wanted`` are void.

    Strided caches: ``stride_row`` from sequence to sequence. Paged: ``stride_row`` from block to block.
    """
    if PAGED:
        block = positions // block_size
        blocks = tl.load(block_table + row * table_stride + block, mask=wanted, other=0)
        inside = positions - block * block_size
        offsets = blocks.to(tl.int64) * stride_row + inside.to(tl.int64) * stride_token
    else:
        offsets = row.to(tl.int64) * stride_row + positions.to(tl.int64) * stride_token
    return offsets + head * stride_head


def cache_strides(cache: torch.Tensor, paged: bool) -> tuple[int, int, int, int]:
    """``(row or block, head, token, channel)`` strides of a cache in elements."""
    first, second, third, channel = cache.stride()
    return (first, third, second, channel) if paged else (first, second, third, channel)
