"""Logits that attention keeps for a selection layer, as distances from an origin.

A head's origin is the logit of the row's first token. Logits may share an offset of any size, but
distances are small for every token that matters, so half precision holds them well, and a selection
layer writes and reads half as much. That is more than the bytes: what fits into as much of the GPU's
cache as lines may hold on to is never written to memory, which slows attention by several times what
the bytes take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.scratch import logits_dtype, padded_width
from tidaldecode.kernels.triton._device import cache_bytes
from tidaldecode.kernels.triton._merge import LN2, merged_lse


@dataclass(frozen=True)
class KeptLogits:
    """Of rows of up to ``W`` tokens; token ``t`` of a row that starts at ``s`` is number ``t - s``."""

    distances: torch.Tensor
    """``[B, Hq, W]`` in ``UNIT``, fp32, or fp16 if q has half precision; void behind a row's end.

    There is room behind every row, so that each starts aligned.
    """
    origins: torch.Tensor
    """``[B, Hq]`` fp32 in units of log 2."""

    @classmethod
    def make(cls, q: torch.Tensor, width: int) -> KeptLogits:
        """Uninitialised memory for queries ``q [B, Hq, D]``."""
        batch, heads = q.shape[:2]
        shape = (batch, heads, padded_width(width))
        distances = torch.empty(shape, dtype=logits_dtype(q.dtype), device=q.device)
        origins = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
        return cls(distances[..., :width], origins)

    @property
    def eviction(self) -> str:
        """How distances are stored: to leave the GPU's cache last, unless they are more than it.

        They are read right after the attention, whose K and V would drive them out. (Lines may hold on
        to 3/16 of an H200's cache so; beyond that it does not matter.)
        """
        if self.distances.device.type != "cuda" or len(self.distances) > _STAYING_ROWS:
            return ""
        size = self.distances.untyped_storage().nbytes()
        return "evict_last" if size <= cache_bytes(self.distances.device) * 9 // 8 else ""


UNIT: tl.constexpr = tl.constexpr(256.0)
"""Of distances, in log 2: a power of two that leaves fp16 room for any that occur."""
HEADS_AT_ONCE = 32
"""Query heads whose distances are loaded together."""
_STAYING_ROWS = 16
"""Rows from which on it does not depend on their size what is compiled."""


@triton.jit
def keep_logits(
    distances, logit, origin, number, kept, there, first, width,
    EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keep ``logit [ROWS, TILE]`` of the tokens from number ``first`` on, where ``there``.

    ``origin [ROWS]``; ``number [ROWS]`` counts heads over the batch, of which those ``kept`` are real.
    """
    place = number.to(tl.int64)[:, None] * width + (first + tl.arange(0, TILE))[None, :]
    distance = ((origin[:, None] - logit) / UNIT).to(distances.dtype.element_ty)
    wanted = kept[:, None] & there[None, :]
    tl.store(distances + place, distance, mask=wanted, eviction_policy=EVICTION)


@triton.jit
def summed_scores(
    distances, origins, part_lse, row_cuts, lse, index, first, count, width, splits, row_heads,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    CUT: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Scores ``[TOKENS]`` of one set, over its ``HEADS`` heads; void from number ``count`` on.

    They begin with number ``first``, a multiple of ``TOKENS``. Those of a softmax (``SOFTMAX``) take
    log-sum-exps from `merged_lse`, ``PARTS`` parts at once. A thread loads ``VECTOR`` distances of a
    head at once, a power of two that divides widths.
    """
    number = first // TOKENS * TOKENS + tl.arange(0, TOKENS)
    # Bounds that divide by it let it do so; rows have room for what is beyond.
    near = number < tl.cdiv(count, VECTOR) * VECTOR
    # No more than this is known of the width, or threads would take more tokens, and fewer take any.
    width = width // VECTOR * VECTOR
    score = tl.zeros([TOKENS], tl.float32)
    for low in tl.static_range(0, HEADS, ROWS):
        head = low + tl.arange(0, ROWS)
        known = head < HEADS
        query = index.to(tl.int64) * HEADS + head
        # Nobody reads them again.
        distance = tl.load(
            distances + (query * width)[:, None] + number[None, :],
            mask=known[:, None] & near[None, :],
            other=float("inf"),
            eviction_policy="evict_first",
        )
        distance = distance.to(tl.float32) * UNIT
        origin = tl.load(origins + query, mask=known, other=0.0)
        if SOFTMAX:
            whole = merged_lse(
                part_lse, row_cuts, lse, query, known, splits, row_heads, CUT, ROWS, PARTS
            )  # fmt: skip
            # Gathered, they take the layout of the distances, which would else be given theirs.
            origin -= tl.gather(whole, tl.arange(0, ROWS), 0)
            score += tl.sum(tl.exp2(origin[:, None] - distance), 0)
        else:
            logit = (origin[:, None] - distance) * LN2
            score += tl.sum(tl.where(known[:, None], logit, 0.0), 0)
    return score


def tokens_a_thread(tokens: int, warps: int) -> int:
    """``VECTOR`` of `summed_scores` with which ``warps`` take ``tokens`` once, each its own."""
    return max(1, min(8, tokens // (32 * warps)))
