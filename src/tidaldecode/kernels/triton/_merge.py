"""What the parts of a head found, merged: the attention's output, or only its log-sum-exp.

``part_out [slots, D]`` and ``part_lse [slots]``, in units of log 2, hold the parts of all heads.
Without ``CUT`` every head has ``splits``. With it a row has those that ``row_cuts [B, 2]`` says, its
first and their number, and ``splits`` counts those of all rows; what one program did alone is no part
then, but is in ``out`` and ``lse`` already.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_heads(
    part_out, part_lse, row_cuts, out, lse, head, known, splits, row_heads,
    CUT: tl.constexpr,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Store ``out`` and ``lse`` of heads ``head [HEADS]`` of the batch, ``AT_ONCE`` parts at a time."""
    begin, count = _parts_of(head, known, row_cuts, splits, row_heads, CUT, HEADS)
    most = splits
    if CUT:
        known = known & (count != 1)
        most = tl.max(tl.where(known, count, 0), 0)
    channel = tl.arange(0, DP)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DP], tl.float32)
    for first in range(0, most, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        slot = begin[:, None] + split[None, :]
        wanted = known[:, None] & (split[None, :] < count[:, None])
        part = tl.load(part_lse + slot, mask=wanted, other=float("-inf"))
        # Loaded before it is known which parts found something, so as not to wait for that.
        values = tl.load(
            part_out + slot[:, :, None] * D + channel[None, None, :],
            mask=wanted[:, :, None] & (channel < D)[None, None, :],
            other=0.0,
        )
        values = tl.where((part > float("-inf"))[:, :, None], values, 0.0)
        peak, total, weight, old = _take_in(peak, total, part)
        acc = acc * old[:, None] + tl.sum(values * weight[:, :, None], 1)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(
        out + head[:, None] * D + channel[None, :],
        (acc / safe[:, None]).to(out.dtype.element_ty),
        mask=known[:, None] & (channel < D)[None, :],
    )
    tl.store(lse + head, _log_sum_exp(peak, total) * LN2, mask=known)


@triton.jit
def merged_lse(
    part_lse, row_cuts, lse, head, known, splits, row_heads,
    CUT: tl.constexpr,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps ``[HEADS]`` in units of log 2 of heads whose parts may not be merged yet.

    ``AT_ONCE`` 0: no head is in parts, and all of ``lse`` is there. Unknown heads have 0.
    """
    if AT_ONCE == 0:
        found = tl.load(lse + head, mask=known, other=0.0) / LN2
    else:
        begin, count = _parts_of(head, known, row_cuts, splits, row_heads, CUT, HEADS)
        in_parts, most = known, splits
        if CUT:
            in_parts = known & (count != 1)
            most = tl.max(tl.where(in_parts, count, 0), 0)
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        for first in range(0, most, AT_ONCE):
            split = first + tl.arange(0, AT_ONCE)
            wanted = in_parts[:, None] & (split[None, :] < count[:, None])
            part = tl.load(
                part_lse + begin[:, None] + split[None, :], mask=wanted, other=float("-inf")
            )
            peak, total, _, _ = _take_in(peak, total, part)
        found = tl.where(known, _log_sum_exp(peak, total), 0.0)
        if CUT:
            alone = known & (count == 1)
            found = tl.where(alone, tl.load(lse + head, mask=alone, other=0.0) / LN2, found)
    return found


@triton.jit
def _parts_of(
    head, known, row_cuts, splits, row_heads, CUT: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """``(begin, count)``, both ``[HEADS]``: the slot of a head's first part, and its parts."""
    if CUT:
        row = head // row_heads
        begin = (head - row * row_heads) * splits + tl.load(row_cuts + row * 2, mask=known, other=0)
        count = tl.load(row_cuts + row * 2 + 1, mask=known, other=0)
    else:
        begin = head * splits
        count = tl.full([HEADS], 0, tl.int32) + splits
    return begin, count


@triton.jit
def _take_in(peak, total, part):
    """``(peak, total, weight, old)``: with the parts' log-sum-exps ``part [HEADS, AT_ONCE]`` taken in.

    ``weight`` is what the parts' outputs count, and ``old`` what those before count now.
    """
    new_peak = tl.maximum(peak, tl.max(part, 1))
    safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(part - safe_peak[:, None])
    old = tl.exp2(peak - safe_peak)
    return new_peak, total * old + tl.sum(weight, 1), weight, old


@triton.jit
def _log_sum_exp(peak, total):
    """Of what `_take_in` took in, -inf if that was nothing."""
    full = total > 0
    return tl.where(full, peak + tl.log2(tl.where(full, total, 1.0)), float("-inf"))
