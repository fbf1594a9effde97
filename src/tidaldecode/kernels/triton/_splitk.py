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

from tidaldecode.kernels.partition import parts
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634

_MERGED_SPLITS = 32
"""Partial outputs of one head that a merge holds in registers at a time."""
_MERGED = 4096
"""Their numbers, over all heads of a program."""
_PROGRAMS = 4
"""Programs a processor that are enough to keep it busy."""


@triton.jit
def store_split(
    acc, peak, total, split, splits, number, kept, part_out, part_lse, out, lse,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Store what one of several splits found, or, without ``SPLIT``, the result itself.

    ``acc [ROWS, DP]`` unnormalised, ``peak, total [ROWS]``; ``number [ROWS]`` counts the heads of all
    queries over the batch, of which those ``kept`` are real. Parts: ``part_out [numbers, splits, D]``,
    ``part_lse [numbers, splits]``.
    """
    channel = tl.arange(0, DP)
    inside = kept[:, None] & (channel < D)[None, :]
    full = total > 0
    normal = acc / tl.where(full, total, 1.0)[:, None]
    lse2 = tl.where(full, peak + tl.log2(tl.where(full, total, 1.0)), float("-inf"))
    query = number.to(tl.int64)
    if not SPLIT:
        target = out + query[:, None] * D + channel[None, :]
        tl.store(target, normal.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + query, lse2 * LN2, mask=kept)
    else:
        slot = query * splits + split
        tl.store(part_out + slot[:, None] * D + channel[None, :], normal, mask=inside)
        tl.store(part_lse + slot, lse2, mask=kept)


@triton.jit
def store_nothing(split, splits, number, kept, part_lse, ROWS: tl.constexpr):
    """Mark a split that has no tokens; its part of the output is never read."""
    slot = number.to(tl.int64) * splits + split
    tl.store(part_lse + slot, tl.full([ROWS], float("-inf"), tl.float32), mask=kept)


@triton.jit(do_not_specialize=["splits", "numbers"])
def _merge_kernel(
    part_out, part_lse, out, lse, splits, numbers,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(numbers / HEADS),)``: a program merges the splits of ``HEADS`` heads of queries."""
    wait_for_predecessor(OVERLAP)
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    known = head < numbers
    channel = tl.arange(0, DP)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DP], tl.float32)
    for first in range(0, splits, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        slot = head[:, None] * splits + split[None, :]
        wanted = known[:, None] & (split < splits)[None, :]
        part = tl.load(part_lse + slot, mask=wanted, other=float("-inf"))
        there = part > float("-inf")
        new_peak = tl.maximum(peak, tl.max(part, 1))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(part - safe_peak[:, None])
        old = tl.exp2(peak - safe_peak)
        values = tl.load(
            part_out + slot[:, :, None] * D + channel[None, None, :],
            mask=there[:, :, None] & (channel < D)[None, None, :],
            other=0.0,
        )
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
    splits: int

    @classmethod
    def make(cls, q: torch.Tensor, splits: int, out: torch.Tensor | None = None) -> SplitOutputs:
        """Uninitialised memory for queries ``[B, Hq, D]`` or ``[B, T, Hq, D]``.

        ``out``, if given, is part of it.
        """
        head_dim = q.shape[-1]
        parts = math.prod(q.shape[:-1]) * splits if splits > 1 else 0
        memory = torch.empty(parts * (head_dim + 1), dtype=torch.float32, device=q.device)
        return cls(
            torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out,
            torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device),
            memory[: parts * head_dim],
            memory[parts * head_dim :],
            splits,
        )

    def merge(self) -> None:
        """Merge the parts, if there are any."""
        if self.splits == 1:
            return
        head_dim, numbers = self.out.shape[-1], self.lse.numel()
        padded_dim = triton.next_power_of_2(head_dim)
        at_once = min(_MERGED_SPLITS, triton.next_power_of_2(self.splits))
        heads = heads_at_once(numbers, at_once * padded_dim, _MERGED, self.out.device)
        _merge_kernel[(triton.cdiv(numbers, heads),)](
            self.part_out, self.part_lse, self.out, self.lse, self.splits, numbers,
            HEADS=heads,
            AT_ONCE=at_once,
            D=head_dim,
            DP=padded_dim,
            num_warps=4,
            **overlap(self.out.device),
        )  # fmt: skip


def split_count(heads: int, most: int, device: torch.device, per_processor: int = 1) -> int:
    """Splits of each of ``heads`` (over the batch), at most ``most``, that just fill the device."""
    usual = max(1, min(most, per_processor * processors(device) // max(heads, 1)))
    return min(max(most, 1), parts(usual))


def heads_at_once(heads: int, elements: int, most: int, device: torch.device) -> int:
    """Heads, a power of two, that a program takes where there are many: launching one costs time too.

    Args:
        elements: what a program holds of one head.
        most: what a program may hold.
    """
    spare = heads // (_PROGRAMS * processors(device))
    fitting = most // elements
    return 1 << (max(1, min(spare, fitting)).bit_length() - 1)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a handful where the kernels are interpreted."""
    if device.type != "cuda":
        return 12
    return torch.cuda.get_device_properties(device).multi_processor_count
