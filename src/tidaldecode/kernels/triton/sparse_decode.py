"""sparse_decode in Triton: split-K over the selected tokens, gathered by position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels import layout
from tidaldecode.kernels.select_tokens import Selection
from tidaldecode.kernels.triton._cache import ROW_ARGUMENTS, cache_strides, token_offsets
from tidaldecode.kernels.triton._cuts import Cuts, split_count
from tidaldecode.kernels.triton._device import fitting_stages, processors
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor
from tidaldecode.kernels.triton._splitk import LOG2E, SplitOutputs, store_split


@triton.jit(do_not_specialize=["splits", "stretch"], do_not_specialize_on_alignment=ROW_ARGUMENTS)
def _sparse_kernel(
    q, k, v, positions, counts, whole_lens, block_table, out, lse, part_out, part_lse,
    scale, table_stride, block_size, capacity, budget, splits, stretch,
    q_row, q_head, q_channel,
    k_row, k_head, k_token, k_channel,
    v_row, v_head, v_token, v_channel,
    p_row, p_set, p_token, c_row, c_set,
    WHOLE_ROWS: tl.constexpr,
    PAGED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE: tl.constexpr,
    SHARED_SET: tl.constexpr,
    SHARERS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(splits, H, B)``, H = max(R, Hkv): one program, one stretch of one head's selection.

    ``SHARERS`` of these heads read the same KV head.
    With ``SINGLE`` no stretch is longer than a tile. Its positions are loaded before their number and
    the query, so as not to wait for these.
    """
    wait_for_predecessor(OVERLAP)
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    kv_head = head // SHARERS
    chosen_set = 0 if SHARED_SET else head
    chosen = positions + row.to(tl.int64) * p_row + chosen_set * p_set
    step = tl.arange(0, BLOCK)
    if WHOLE_ROWS:
        whole = tl.load(whole_lens + row)
        count = tl.load(counts + row * c_row + chosen_set * c_set)
        count = tl.where(whole > 0, whole, count)
        stretch = tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK
        budget = tl.where(whole > 0, 0, budget)
    lowest = split * stretch
    if SINGLE:
        slot = lowest + step
        token = tl.load(chosen + slot * p_token, mask=slot < budget, other=-1)
    if not WHOLE_ROWS:
        count = tl.load(counts + row * c_row + chosen_set * c_set)
    highest = tl.minimum(lowest + stretch, count)
    # What several programs share is walked through to its end, which is known before the count is.
    stop = tl.minimum(lowest + stretch, budget) if SPLIT and not WHOLE_ROWS else highest
    group = tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    number = (row * heads + head) * GROUP + group
    place = number.to(tl.int64) * splits + split
    q_offsets = row.to(tl.int64) * q_row + (head * GROUP + group)[:, None] * q_head
    query = tl.load(
        q + q_offsets + channel[None, :] * q_channel,
        mask=(group < GROUP)[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for first in range(lowest, stop, BLOCK):
        if not SINGLE:
            slot = first + step
            token = tl.load(chosen + slot * p_token, mask=slot < budget, other=-1)
        if WHOLE_ROWS:
            token = tl.where(whole > 0, slot, token)
        there = (slot < highest) & (token >= 0) & (token < capacity)
        inside = there[:, None] & (channel < D)[None, :]
        at = token_offsets(
            token, row, kv_head, there, block_table, table_stride, block_size,
            k_row, k_head, k_token, PAGED,
        )  # fmt: skip
        key = tl.load(k + at[:, None] + channel[None, :] * k_channel, mask=inside, other=0.0)
        at = token_offsets(
            token, row, kv_head, there, block_table, table_stride, block_size,
            v_row, v_head, v_token, PAGED,
        )  # fmt: skip
        value = tl.load(v + at[:, None] + channel[None, :] * v_channel, mask=inside, other=0.0)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logit = tl.where(there[None, :], logit, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        # A stretch may hold nothing but padding: -inf - -inf would be NaN.
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(logit - safe_peak[:, None])
        old = tl.exp2(peak - safe_peak)
        total = total * old + tl.sum(weight, 1)
        acc = acc * old[:, None]
        # Weights in the values' precision, as the hardware multiplies; exact ones cost 5 to 8 %.
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
        peak = new_peak
    store_split(
        acc, peak, total, place, number, group < GROUP, part_out, part_lse, out, lse, False,
        SPLIT, D, DP,
    )  # fmt: skip


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    *,
    scale: float,
    block_table: torch.Tensor | None,
    whole_lens: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of `tidaldecode.kernels.sparse_decode`; positions beyond the cache's capacity are skipped."""
    batch, query_heads, head_dim = q.shape
    paged = block_table is not None
    kv_heads = k.shape[2] if paged else k.shape[1]
    sets, budget = selection.positions.shape[1:]
    heads = max(sets, kv_heads)
    group = query_heads // heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    programs = _parts(batch * heads, budget, _largest_tile(padded_dim, q.element_size()), q.device)
    tokens = triton.cdiv(budget, programs)
    per_processor = triton.cdiv(batch * heads, processors(q.device))
    block, warps, stages = _tile(padded_dim, q.element_size(), tokens, per_processor)
    splits = min(programs, triton.cdiv(max(budget, 1), block))
    stretch = triton.cdiv(triton.cdiv(budget, block), splits) * block
    results = SplitOutputs.make(q, Cuts.even(batch, splits), out)
    if batch == 0:
        return results.out, results.lse
    _sparse_kernel[(splits, heads, batch)](
        q, k, v, selection.positions, selection.counts, whole_lens, block_table,
        results.out, results.lse, results.part_out, results.part_lse,
        scale * LOG2E,
        0 if block_table is None else block_table.stride(0),
        k.shape[1] if paged else 0,
        layout.capacity(k, block_table),
        budget,
        splits,
        stretch,
        *q.stride(),
        *cache_strides(k, paged),
        *cache_strides(v, paged),
        *selection.positions.stride(),
        *selection.counts.stride(),
        WHOLE_ROWS=whole_lens is not None,
        PAGED=paged,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        D=head_dim,
        DP=padded_dim,
        BLOCK=block,
        SPLIT=splits > 1,
        SINGLE=stretch <= block and whole_lens is None,
        SHARED_SET=sets == 1,
        SHARERS=heads // kv_heads,
        num_warps=warps,
        num_stages=fitting_stages(stages, 2 * block * padded_dim * k.element_size(), k.device),
        **overlap(q.device),
    )  # fmt: skip
    results.merge()
    return results.out, results.lse


_FEW_PARTS = 8
_TOKENS = 256
"""Parts of several tiles are that few, or have that many tokens: more of them take longer to merge."""

_FEWEST = 64
"""Tokens of a tile: smaller ones leave more parts to merge."""


def _parts(heads: int, budget: int, largest_tile: int, device: torch.device) -> int:
    """Parts of the ``budget`` tokens of each of ``heads``, counted over all rows.

    A part of one tile asks for all that it reads at once. Where two programs a multiprocessor are enough
    for that, no part has more (best between a layer's products as well, on an H200).
    """
    single = max(_FEW_PARTS, triton.cdiv(budget, largest_tile))
    if heads * single <= 2 * processors(device):
        return split_count(heads, single, device, per_processor=2)
    most = max(_FEW_PARTS, triton.cdiv(budget, _TOKENS))
    return split_count(heads, min(most, max(budget, 1)), device)


def _largest_tile(padded_dim: int, element_size: int) -> int:
    """Most tokens of a tile."""
    return 4096 // padded_dim if element_size == 4 else min(128, 16384 // padded_dim)


def _tile(
    padded_dim: int, element_size: int, tokens: int, per_processor: int
) -> tuple[int, int, int]:
    """``(tokens in a tile, warps, pipeline stages)``, measured between a layer's products on an H200.

    Args:
        tokens: what a program reads.
        per_processor: programs that a multiprocessor is given.
    """
    most, stages = _largest_tile(padded_dim, element_size), 2
    if element_size < 4 and per_processor > 2 and padded_dim > 64:
        most, stages = 64, 3
    elif element_size < 4 and per_processor == 1 and tokens > most:
        stages = 3
    return max(16, min(most, max(_FEWEST, triton.next_power_of_2(tokens)))), 4, stages
