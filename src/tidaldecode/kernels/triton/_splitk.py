"""Split-K: several programs share one head's tokens, and a second launch merges what they found.

Flash-Decoding's scheme. Merging in the last program to finish saves a launch, but made short splits
slower: one program per KV head then merges what otherwise one per query head does. Logits are in
units of log 2 throughout (exp2 is what the hardware has). The number of splits is an argument of the
kernels, not a part of them: batches of every size would compile their own otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.triton._cuts import Cuts
from tidaldecode.kernels.triton._device import heads_at_once
from tidaldecode.kernels.triton._merge import LN2, merge_heads
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor

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
    """Grid ``(ceil(numbers / HEADS),)``: a program merges the splits of ``HEADS`` heads of queries."""
    wait_for_predecessor(OVERLAP)
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    merge_heads(
        part_out, part_lse, row_cuts, out, lse, head, head < numbers, splits, row_heads,
        CUT, HEADS, AT_ONCE, D, DP,
    )  # fmt: skip


Pieces: TypeAlias = tuple[torch.Tensor | None, ...]


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
        parts = self.parts_at_once
        if parts == 0 or len(self.lse) == 0:
            return
        numbers, padded_dim = self.lse.numel(), triton.next_power_of_2(self.out.shape[-1])
        heads = heads_at_once(numbers, parts * padded_dim, _MERGED, self.out.device)
        _merge_kernel[(triton.cdiv(numbers, heads),)](
            *self.pieces, self.splits, numbers, numbers // len(self.lse),
            CUT=self.row_cuts is not None,
            HEADS=heads,
            AT_ONCE=parts,
            D=self.out.shape[-1],
            DP=padded_dim,
            num_warps=4,
            **overlap(self.out.device),
        )  # fmt: skip

    @property
    def pieces(self) -> Pieces:
        """Parts and results in the order in which `merge_heads` takes them."""
        return self.part_out, self.part_lse, self.row_cuts, self.out, self.lse

    @property
    def splits(self) -> int:
        """Parts of a head, over all rows where these differ: how many `merge_heads` is to expect."""
        return self.cuts.most if self.cuts.share is None else self.cuts.items

    @property
    def parts_at_once(self) -> int:
        """Parts of a head that are merged at once, a power of two; 0: a head is never in parts."""
        if self.cuts.most == 1:
            return 0
        share = self.cuts.share
        most = self.cuts.most if share is None else min(self.cuts.most, share)
        power: int = triton.next_power_of_2(most)
        return min(_MERGED_SPLITS, power)


@dataclass(frozen=True)
class Mergers:
    """Programs that merge parts beside those of the kernel that comes next: a launch less."""

    results: SplitOutputs | None
    """None: there was no attention before."""
    programs: int
    """For the heads of one set; 0 if no head is in parts."""
    heads: int
    """Of a program, a power of two."""

    @classmethod
    def of(cls, results: SplitOutputs | None, heads: int) -> Mergers:
        """For the ``heads`` heads of every set."""
        if results is None or results.parts_at_once == 0:
            return cls(results, 0, 1)
        merged = triton.next_power_of_2(triton.cdiv(heads, _MOST_MERGERS))
        return cls(results, triton.cdiv(heads, merged), merged)

    @property
    def pieces(self) -> Pieces:
        """As `SplitOutputs.pieces`."""
        return (None,) * 5 if self.results is None else self.results.pieces

    @property
    def splits(self) -> int:
        """As `SplitOutputs.splits`."""
        return 0 if self.results is None else self.results.splits

    def constants(self, warps: int) -> dict[str, int | bool]:
        """What a kernel whose programs have ``warps`` warps is to be compiled with."""
        if self.results is None:
            return {"CUT": False, "PARTS": 0, "MERGED": 1, "D": 1, "DP": 1}
        head_dim = self.results.out.shape[-1]
        padded_dim = triton.next_power_of_2(head_dim)
        room = max(1, warps * _MERGED_A_WARP // (self.heads * padded_dim))
        return {
            "CUT": self.results.row_cuts is not None,
            "PARTS": min(self.results.parts_at_once, room),
            "MERGED": self.heads,
            "D": head_dim,
            "DP": padded_dim,
        }


_MOST_MERGERS = 8
"""Programs of a set that merge beside others: they have time, and take the others' place."""
_MERGED_A_WARP = 1024
"""Numbers of partial outputs that each of their warps holds at a time."""
