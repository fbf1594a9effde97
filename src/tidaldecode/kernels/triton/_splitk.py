"""Split-K: several programs share one head's tokens, and a second launch merges what they found.

Flash-Decoding's scheme. Merging in the last program to finish saves a launch, but made short splits
slower: one program per KV head then merges what otherwise one per query head does. Logits are in
units of log 2 throughout (exp2 is what the hardware has). The number of splits is an argument of the
kernels, not a part of them: batches of every size would compile their own otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.triton._cuts import Cuts
from tidaldecode.kernels.triton._device import heads_at_once
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634

_MERGED_SPLITS = 32
"""Partial outputs of one head that a merge holds in registers at a time."""
_MERGED = 4096
"""Their numbers, over all heads of a program."""


@triton.jit
def store_split(
    acc, peak, total, slot, number, kept, part_out, part_lse, out, lse, alone,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Store what one of several splits found, or, without ``SPLIT`` or ``alone``, the result itself.

    ``acc [ROWS, DP]`` unnormalised, ``peak, total [ROWS]``; ``number [ROWS]`` counts the heads of all
    queries over the batch, of which those ``kept`` are real, and ``slot [ROWS]`` their parts:
    ``part_out [slots, D]``, ``part_lse [slots]``.
    """
    channel = tl.arange(0, DP)
    inside = kept[:, None] & (channel < D)[None, :]
    full = total > 0
    normal = acc / tl.where(full, total, 1.0)[:, None]
    lse2 = tl.where(full, peak + tl.log2(tl.where(full, total, 1.0)), float("-inf"))
    query = number.to(tl.int64)
    target = out + query[:, None] * D + channel[None, :]
    if SPLIT:
        if alone:
            tl.store(target, normal.to(out.dtype.element_ty), mask=inside)
            tl.store(lse + query, lse2 * LN2, mask=kept)
        else:
            tl.store(part_out + slot[:, None] * D + channel[None, :], normal, mask=inside)
            tl.store(part_lse + slot, lse2, mask=kept)
    else:
        tl.store(target, normal.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + query, lse2 * LN2, mask=kept)


@triton.jit
def store_nothing(slot, kept, part_lse, ROWS: tl.constexpr):
    """Mark a part that has no tokens; what it would store of the output is never used."""
    tl.store(part_lse + slot, tl.full([ROWS], float("-inf"), tl.float32), mask=kept)


@triton.jit(do_not_specialize=["splits", "numbers", "row_heads"])
def _merge_kernel(
    part_out, part_lse, row_cuts, out, lse, splits, numbers, row_heads,
    CUT: tl.constexpr,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(numbers / HEADS),)``: a program merges the splits of ``HEADS`` heads of queries.

    ``CUT``: each row has those that ``row_cuts [B, 2]`` says, and ``splits`` counts those of all rows.
    """
    wait_for_predecessor(OVERLAP)
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    known = head < numbers
    if CUT:
        row = head // row_heads
        begin = (head - row * row_heads) * splits + tl.load(row_cuts + row * 2, mask=known, other=0)
        count = tl.load(row_cuts + row * 2 + 1, mask=known, other=0)
        # What one program did alone is no part: the result is there. Rows of no parts are empty.
        known = known & (count != 1)
        most = tl.max(tl.where(known, count, 0), 0)
    else:
        begin = head * splits
        count = tl.full([HEADS], 0, tl.int32) + splits
        most = splits
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
        new_peak = tl.maximum(peak, tl.max(part, 1))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(part - safe_peak[:, None])
        old = tl.exp2(peak - safe_peak)
        acc = acc * old[:, None] + tl.sum(values * weight[:, :, None], 1)
        total = total * old + tl.sum(weight, 1)
        peak = new_peak
    full = total > 0
    safe = tl.where(full, total, 1.0)
    tl.store(
        out + head[:, None] * D + channel[None, :],
        (acc / safe[:, None]).to(out.dtype.element_ty),
        mask=known[:, None] & (channel < D)[None, :],
    )
    tl.store(lse + head, tl.where(full, (peak + tl.log2(safe)) * LN2, float("-inf")), mask=known)


@dataclass(frozen=True)
class SplitOutputs:
    """Results of a split-K kernel, and the parts that they are merged from."""

    out: torch.Tensor
    """``[B, Hq, D]`` or ``[B, T, Hq, D]`` in q's dtype."""
    lse: torch.Tensor
    """``[B, Hq]`` or ``[B, T, Hq]`` fp32."""
    part_out: torch.Tensor
    part_lse: torch.Tensor
    row_cuts: torch.Tensor | None
    """``[B, 2]`` int32: a row's first item and its parts, where these follow from the lengths."""
    cuts: Cuts

    @classmethod
    def make(cls, q: torch.Tensor, cuts: Cuts, out: torch.Tensor | None = None) -> SplitOutputs:
        """Uninitialised memory for queries ``[B, Hq, D]`` or ``[B, T, Hq, D]``.

        ``out``, if given, is part of it.
        """
        head_dim = q.shape[-1]
        parts = math.prod(q.shape[1:-1]) * cuts.items if cuts.most > 1 else 0
        memory = torch.empty(parts * (head_dim + 1), dtype=torch.float32, device=q.device)
        by_length = cuts.share is not None
        return cls(
            torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out,
            torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device),
            memory[: parts * head_dim],
            memory[parts * head_dim :],
            torch.empty(len(q), 2, dtype=torch.int32, device=q.device) if by_length else None,
            cuts,
        )

    def merge(self) -> None:
        """Merge the parts, if there are any."""
        if self.cuts.most == 1:
            return
        head_dim, numbers = self.out.shape[-1], self.lse.numel()
        padded_dim = triton.next_power_of_2(head_dim)
        share = self.cuts.share
        splits = self.cuts.most if share is None else min(self.cuts.most, share)
        at_once = min(_MERGED_SPLITS, triton.next_power_of_2(splits))
        heads = heads_at_once(numbers, at_once * padded_dim, _MERGED, self.out.device)
        _merge_kernel[(triton.cdiv(numbers, heads),)](
            self.part_out, self.part_lse, self.row_cuts, self.out, self.lse,
            splits if share is None else self.cuts.items,
            numbers, numbers // len(self.lse),
            CUT=share is not None,
            HEADS=heads,
            AT_ONCE=at_once,
            D=head_dim,
            DP=padded_dim,
            num_warps=4,
            **overlap(self.out.device),
        )  # fmt: skip
