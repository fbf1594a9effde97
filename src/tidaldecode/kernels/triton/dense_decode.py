"""dense_decode in Triton: split-K, the query heads of a KV head in one tile, lengths on the device.

Several queries of a row share the tile too, so that a verification reads K and V once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels import layout
from tidaldecode.kernels.contract import ScoreKind
from tidaldecode.kernels.triton._cache import ROW_ARGUMENTS, cache_strides, token_offsets
from tidaldecode.kernels.triton._cuts import Cuts, find_part
from tidaldecode.kernels.triton._device import fitting_stages
from tidaldecode.kernels.triton._logits import KeptLogits, keep_logits
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor
from tidaldecode.kernels.triton._splitk import LOG2E, SplitOutputs, store_nothing, store_split
from tidaldecode.kernels.triton.score_tokens import score_tokens


@triton.jit
def _attend_tile(
    query, peak, total, acc, origin, first, start, highest, limit, number, kept,
    row, head, k, v, block_table, distances, scale, table_stride, block_size,
    logits_width,
    k_row, k_head, k_token, k_channel, v_row, v_head, v_token, v_channel,
    PAGED: tl.constexpr,
    KEEP_LOGITS: tl.constexpr,
    EVICTION: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """``peak, total [ROWS]`` and ``acc [ROWS, DP]`` with the tokens from ``first`` on taken in.

    ``MASKED``: some are beyond the stretch, or unseen by some queries.
    """
    channel = tl.arange(0, DP)
    token = first + tl.arange(0, BLOCK)
    there = token < highest if MASKED else tl.full([BLOCK], True, tl.int1)
    inside = there[:, None] & (channel < D)[None, :]
    at = token_offsets(
        token, row, head, there, block_table, table_stride, block_size,
        k_row, k_head, k_token, PAGED,
    )  # fmt: skip
    key = tl.load(k + at[:, None] + channel[None, :] * k_channel, mask=inside, other=0.0)
    logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if KEEP_LOGITS:
        keep_logits(
            distances, logit, origin, number, kept, there, first - start, logits_width, EVICTION, BLOCK
        )  # fmt: skip
    if MASKED:
        seen = there[None, :]
        if QUERIES > 1:
            seen = seen & (token[None, :] < limit[:, None])
        logit = tl.where(seen, logit, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logit, 1))
    safe_peak = new_peak
    if MASKED and QUERIES > 1:
        # A query may see nothing of a tile: -inf - -inf would be NaN.
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(logit - safe_peak[:, None])
    old = tl.exp2(peak - safe_peak)
    total = total * old + tl.sum(weight, 1)
    at = token_offsets(
        token, row, head, there, block_table, table_stride, block_size,
        v_row, v_head, v_token, PAGED,
    )  # fmt: skip
    value = tl.load(v + at[:, None] + channel[None, :] * v_channel, mask=inside, other=0.0)
    # Weights in the values' precision, as the hardware multiplies; exact ones cost 5 to 8 %.
    acc = tl.dot(weight.to(value.dtype), value, acc * old[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit(
    do_not_specialize=["batch", "most", "share", "spare"],
    do_not_specialize_on_alignment=ROW_ARGUMENTS,
)
def _dense_kernel(
    q, k, v, seq_lens, starts, block_table, out, lse, distances, origins, part_out, part_lse, row_cuts,
    scale, table_stride, block_size, logits_width, batch, most, share, spare,
    q_row, q_query, q_head, q_channel,
    k_row, k_head, k_token, k_channel,
    v_row, v_head, v_token, v_channel,
    PADDED: tl.constexpr,
    PAGED: tl.constexpr,
    KEEP_LOGITS: tl.constexpr,
    EVICTION: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BATCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(Hkv * TILES, items)``: one program attends to one part of a row for one KV head.

    A tile holds ``ROWS`` of the ``QUERIES * GROUP`` query heads that read the KV head. Where there are
    several tiles, those of one part run side by side and find its tokens in the GPU's cache.
    ``BATCH``, a power of two from the number of rows up: rows are cut by their lengths; 0: evenly.
    """
    wait_for_predecessor(OVERLAP)
    head, item = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(0) // TILES
    lane = tl.arange(0, ROWS)
    if TILES > 1:
        lane += (head % TILES) * ROWS
        head = head // TILES
    if BATCH > 0:
        noting = (tl.program_id(0) == 0) & (item == 0)
        row, part, parts, first_item = find_part(
            item, seq_lens, starts, row_cuts, batch, most, share, spare, noting, BATCH, PADDED
        )
        if row == batch:
            return
    else:
        row, part, parts, first_item = item // most, item % most, most, item // most * most
    end = tl.load(seq_lens + row)
    start = tl.load(starts + row) if PADDED else 0
    kept = lane < QUERIES * GROUP
    if QUERIES == 1:
        heads = head * GROUP + lane
        number = row * kv_heads * GROUP + heads
        q_offsets = row.to(tl.int64) * q_row + heads[:, None] * q_head
        limit = end
    else:
        later = lane // GROUP
        heads = head * GROUP + lane % GROUP
        number = (row * QUERIES + later) * kv_heads * GROUP + heads
        q_offsets = row.to(tl.int64) * q_row + (later * q_query + heads * q_head)[:, None]
        # A query sees no token that came after its own.
        limit = end - QUERIES + 1 + later
    channel = tl.arange(0, DP)
    query = tl.load(
        q + q_offsets + channel[None, :] * q_channel,
        mask=kept[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    origin = tl.zeros([ROWS], tl.float32)
    if KEEP_LOGITS:
        token = start + tl.arange(0, 1)
        # Where the address alone is enough, it does not wait for the length; empty rows do not use it.
        there = token < end if PADDED or PAGED else token < logits_width
        at = token_offsets(
            token, row, head, there, block_table, table_stride, block_size,
            k_row, k_head, k_token, PAGED,
        )  # fmt: skip
        inside = there[:, None] & (channel < D)[None, :]
        key = tl.load(k + at[:, None] + channel[None, :] * k_channel, mask=inside, other=0.0)
        origin = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
    stretch = tl.cdiv(tl.cdiv(end - start, BLOCK), parts) * BLOCK
    lowest = start + part * stretch
    highest = tl.minimum(lowest + stretch, end)
    of_row = number - row * QUERIES * kv_heads * GROUP
    slot = of_row.to(tl.int64) * tl.num_programs(1) + first_item + part
    if SPLIT & (parts > 1) & (lowest >= highest):
        store_nothing(slot, kept, part_lse, ROWS)
    else:
        if KEEP_LOGITS:  # noqa: SIM102
            if part == 0:
                tl.store(origins + number, origin, mask=kept)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DP], tl.float32)
        masked = lowest
        if QUERIES > 1:
            # Most tiles are seen whole by every query: masks would cost more than the products.
            seen_by_all = tl.minimum(highest, end - QUERIES + 1)
            masked += tl.maximum(seen_by_all - lowest, 0) // BLOCK * BLOCK
            for first in range(lowest, masked, BLOCK):
                peak, total, acc = _attend_tile(
                    query, peak, total, acc, origin, first, start, highest, limit, number, kept,
                    row, head, k, v, block_table, distances, scale, table_stride, block_size,
                    logits_width,
                    k_row, k_head, k_token, k_channel, v_row, v_head, v_token, v_channel,
                    PAGED, KEEP_LOGITS, EVICTION, QUERIES, D, DP, BLOCK, False,
                )  # fmt: skip
        for first in range(masked, highest, BLOCK):
            peak, total, acc = _attend_tile(
                query, peak, total, acc, origin, first, start, highest, limit, number, kept,
                row, head, k, v, block_table, distances, scale, table_stride, block_size,
                logits_width,
                k_row, k_head, k_token, k_channel, v_row, v_head, v_token, v_channel,
                PAGED, KEEP_LOGITS, EVICTION, QUERIES, D, DP, BLOCK, True,
            )  # fmt: skip
        store_split(
            acc, peak, total, slot, number, kept, part_out, part_lse, out, lse, parts == 1,
            SPLIT, D, DP,
        )  # fmt: skip


def dense_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scores: ScoreKind | None,
    sets: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Twin of `tidaldecode.kernels.dense_decode`; scores ``[B, sets, W]``, W the cache's capacity."""
    results, logits = attend(
        q, k, v, seq_lens,
        scale=scale, starts=starts, block_table=block_table,
        keep_logits=scores is not None,
    )  # fmt: skip
    results.merge()
    if logits is None:
        return results.out, results.lse, None
    softmax = scores != "query_head_logits"
    scored = score_tokens(logits, results.lse, seq_lens, sets=sets, softmax=softmax, starts=starts)
    return results.out, results.lse, scored


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    keep_logits: bool,
) -> tuple[SplitOutputs, KeptLogits | None]:
    """``out [B, Hq, D]`` and ``lse [B, Hq]``, whose parts are still to be merged, and logits, if kept.

    With ``q [B, T, Hq, D]``, ``out [B, T, Hq, D]`` and ``lse [B, T, Hq]``; no logits are kept then.
    """
    batch, query_heads, head_dim = len(q), q.shape[-2], q.shape[-1]
    queries = 1 if q.dim() == 3 else q.shape[1]
    paged = block_table is not None
    kv_heads = k.shape[2] if paged else k.shape[1]
    capacity = layout.capacity(k, block_table)
    group = query_heads // kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    rows = _tile_rows(queries, group, padded_dim, q.element_size())
    tiles = triton.cdiv(queries * group, rows)
    block, warps, stages = _tile(padded_dim, q.element_size(), rows)
    most = triton.cdiv(max(capacity, 1), block)
    programs = _per_processor(padded_dim, batch)
    cuts = Cuts.by_length(batch, kv_heads * tiles, most, q.device, programs)
    results = SplitOutputs.make(q, cuts)
    # Programs that wait beside a predecessor's would be spread unevenly over the multiprocessors.
    launch = overlap(q.device) if programs == 1 else {"OVERLAP": False}
    logits = KeptLogits.make(q, capacity) if keep_logits else None
    if batch == 0:
        return results, logits
    _dense_kernel[(kv_heads * tiles, cuts.items)](
        q, k, v, seq_lens, starts, block_table, results.out, results.lse,
        None if logits is None else logits.distances,
        None if logits is None else logits.origins,
        results.part_out, results.part_lse, results.row_cuts,
        scale * LOG2E,
        0 if block_table is None else block_table.stride(0),
        k.shape[1] if paged else 0,
        0 if logits is None else logits.distances.stride(1),
        batch,
        cuts.most,
        cuts.share or 0,
        cuts.spare,
        *(q.stride() if q.dim() == 4 else (q.stride(0), 0, q.stride(1), q.stride(2))),
        *cache_strides(k, paged),
        *cache_strides(v, paged),
        PADDED=starts is not None,
        PAGED=paged,
        KEEP_LOGITS=keep_logits,
        EVICTION="" if logits is None else logits.eviction,
        QUERIES=queries,
        GROUP=group,
        ROWS=rows,
        TILES=tiles,
        D=head_dim,
        DP=padded_dim,
        BLOCK=block,
        SPLIT=cuts.most > 1,
        BATCH=0 if cuts.share is None else max(_FEWEST_ROWS, triton.next_power_of_2(batch)),
        num_warps=warps,
        num_stages=fitting_stages(stages, 2 * block * padded_dim * k.element_size(), k.device),
        **launch,
    )  # fmt: skip
    return results, logits


def _tile_rows(queries: int, group: int, padded_dim: int, element_size: int) -> int:
    """Query heads of a tile: all that read one KV head, or as many as the registers hold."""
    wanted: int = max(16, triton.next_power_of_2(queries * group))
    if queries == 1:
        return wanted
    return min(wanted, 32 if element_size == 4 else 64 if padded_dim > 128 else 128)


_FEWEST_ROWS = 32
"""Rows that are looked at at once: a warp's; with fewer the compiler needs more registers."""


def _per_processor(padded_dim: int, batch: int) -> int:
    """Programs that keep a multiprocessor busy; few rows are not cut into that many short parts."""
    return 4 if padded_dim <= 32 and batch > 1 else 1


def _tile(padded_dim: int, element_size: int, rows: int) -> tuple[int, int, int]:
    """``(tokens in a tile, warps, pipeline stages)``, measured on an NVIDIA H200 for up to 64 rows."""
    if element_size == 4:
        return max(16, 4096 // padded_dim), 4, 2
    if padded_dim <= 32 and rows <= 32:
        # A warp for every 16 rows: no sum over tokens has to be gathered from several warps.
        return 64, rows // 16, 3
    if rows > 64:
        return 64, 8, 3
    if padded_dim == 64:
        return 128, 4, 4
    if padded_dim > 128:
        return 64, 4, 3 if rows < 64 else 2
    return 128, 4, 3
