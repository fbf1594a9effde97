"""Logits that attention keeps for a selection layer, as distances below a peak.

The peak is the largest logit that the program had seen when it came to a tile. Logits may share an
offset of any size, but distances are small for every token that matters: half precision holds them to
a thousandth of what they are, and a selection layer writes and reads half as much. That is more than
the bytes: distances that fit into what of the GPU's cache lines may hold on to are never
written to memory, which slows attention by several times what the bytes take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.scratch import logits_dtype, padded_width
from tidaldecode.kernels.triton._device import cache_bytes
from tidaldecode.kernels.triton._splitk import LN2


@dataclass(frozen=True)
class KeptLogits:
    """Of rows of up to ``W`` tokens; token ``t`` of a row that starts at ``s`` is number ``t - s``."""

    distances: torch.Tensor
    """``[B, Hq, W]`` in units of log 2, fp32, or fp16 if q has half precision; void behind a row's end.

    There is room behind every row, so that each starts aligned.
    """
    peaks: torch.Tensor
    """``[B, ceil(W / tile), Hq]`` fp32 in units of log 2."""
    tile: int
    """Tokens of a tile."""

    @classmethod
    def make(cls, q: torch.Tensor, width: int, tile: int) -> KeptLogits:
        """Uninitialised memory for queries ``q [B, Hq, D]``."""
        batch, heads = q.shape[:2]
        shape = (batch, heads, padded_width(width))
        distances = torch.empty(shape, dtype=logits_dtype(q.dtype), device=q.device)
        tiles = -(-max(width, 1) // tile)
        peaks = torch.empty((batch, tiles, heads), dtype=torch.float32, device=q.device)
        return cls(distances[..., :width], peaks, tile)

    @property
    def eviction(self) -> str:
        """How distances are stored: to leave the GPU's cache last, where it has room for about all.

        They are read right after the attention, whose K and V would drive them out.
        """
        if self.distances.device.type != "cuda" or len(self.distances) > _STAYING_ROWS:
            return ""
        size = self.distances.untyped_storage().nbytes()
        return "evict_last" if size <= cache_bytes(self.distances.device) * 9 // 8 else ""


_FP16_MOST: tl.constexpr = tl.constexpr(65504.0)
_STAYING_ROWS = 16
"""Rows from which on it does not depend on their size what is compiled."""


@triton.jit
def keep_logits(
    distances, peaks, logit, peak, number, head, kept, there, first, row, heads, width, tiles,
    EVICTION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keep ``logit [ROWS, TILE]`` of the tokens from number ``first`` on, where ``there``.

    ``peak [ROWS]``; ``number [ROWS]`` counts heads over the batch, ``head [ROWS]`` in the row.
    """
    place = number.to(tl.int64)[:, None] * width + (first + tl.arange(0, TILE))[None, :]
    distance = peak[:, None] - logit
    if distances.dtype.element_ty == tl.float16:
        distance = tl.minimum(distance, _FP16_MOST).to(tl.float16)
    wanted = kept[:, None] & there[None, :]
    tl.store(distances + place, distance, mask=wanted, eviction_policy=EVICTION)
    of_tile = row.to(tl.int64) * tiles + first // TILE
    tl.store(peaks + of_tile * heads + head, peak, mask=kept)


@triton.jit
def summed_scores(
    distances, peaks, lse, index, first, count, sets, width, tiles, log2e,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Scores ``[TOKENS]`` of one set, over its ``HEADS`` heads; void from number ``count`` on.

    They begin with number ``first``, a multiple of ``TOKENS``, which like ``TILE`` is a power of two. A
    thread loads ``VECTOR`` distances of a head at once, a power of two that divides widths.
    """
    SPAN: tl.constexpr = TILE if TILE < TOKENS else TOKENS
    span = first // TOKENS * TOKENS + tl.arange(0, TOKENS // SPAN) * SPAN
    token = span[:, None] + tl.arange(0, SPAN)[None, :]
    # Bounds that divide by it let it do so; rows have room for what is beyond.
    near = token < tl.cdiv(count, VECTOR) * VECTOR
    # No more than this is known of the width, or threads would take more tokens, and fewer take any.
    width = width // VECTOR * VECTOR
    of_span = (index // sets).to(tl.int64) * tiles + span // TILE
    score = tl.zeros([TOKENS // SPAN, SPAN], tl.float32)
    for low in tl.static_range(0, HEADS, ROWS):
        head = low + tl.arange(0, ROWS)
        known = head < HEADS
        query = index.to(tl.int64) * HEADS + head
        # Nobody reads them again.
        distance = tl.load(
            distances + (query * width)[:, None, None] + token[None, :, :],
            mask=known[:, None, None] & near[None, :, :],
            other=float("inf"),
            eviction_policy="evict_first",
        ).to(tl.float32)
        peak = tl.load(
            peaks + of_span[None, :] * (sets * HEADS) + (index % sets * HEADS + head)[:, None],
            mask=known[:, None] & (span < count)[None, :],
            other=0.0,
        )
        if SOFTMAX:
            total = tl.load(lse + query, mask=known, other=0.0) * log2e
            peak -= total[:, None]
            score += tl.sum(tl.exp2(peak[:, :, None] - distance), 0)
        else:
            logit = (peak[:, :, None] - distance) * LN2
            score += tl.sum(tl.where(known[:, None, None], logit, 0.0), 0)
    return tl.reshape(score, [TOKENS])


def tokens_a_thread(tokens: int, warps: int) -> int:
    """``VECTOR`` of `summed_scores` with which ``warps`` take ``tokens`` once, each its own."""
    return max(1, min(8, tokens // (32 * warps)))
