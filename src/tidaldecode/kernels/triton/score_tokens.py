"""From kept logits to token scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.scratch import padded_width
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor
from tidaldecode.kernels.triton._splitk import LN2, LOG2E

TOKENS = 256
"""Tokens of one program."""
_WARPS = 4
HEADS_AT_ONCE = 32


@triton.jit
def summed_scores(
    logits, lse, index, token, start, end, logits_width, log2e,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Scores ``[TOKENS]`` of one set, over its ``HEADS`` heads; void outside ``start`` to ``end``.

    A thread loads ``VECTOR`` logits of a head at once, a power of two that divides widths.
    """
    # Bounds that divide by it let it do so; rows have room for what is beyond.
    near = (token >= start // VECTOR * VECTOR) & (token < tl.cdiv(end, VECTOR) * VECTOR)
    # No more than this is known of the width, or threads would take more tokens, and fewer take any.
    width = logits_width // VECTOR * VECTOR
    score = tl.zeros([TOKENS], tl.float32)
    for low in tl.static_range(0, HEADS, ROWS):
        head = low + tl.arange(0, ROWS)
        query = index.to(tl.int64) * HEADS + head
        at = logits + query[:, None] * width + token[None, :]
        known = (head < HEADS)[:, None]
        wanted = known & near[None, :]
        # Nobody reads them again.
        logit = tl.load(at, mask=wanted, other=float("-inf"), eviction_policy="evict_first")
        if SOFTMAX:
            total = tl.load(lse + query, mask=head < HEADS, other=0.0) * log2e
            score += tl.sum(tl.exp2(logit - total[:, None]), 0)
        else:
            score += tl.sum(tl.where(known, logit * LN2, 0.0), 0)
    return score


def tokens_a_thread(tokens: int, warps: int) -> int:
    """``VECTOR`` of `summed_scores` with which ``warps`` take ``tokens`` once, each its own."""
    return max(1, min(8, tokens // (32 * warps)))


@triton.jit(do_not_specialize=["logits_width"])
def _score_kernel(
    logits, lse, seq_lens, starts, scores, sets, width, logits_width, log2e,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(W / TOKENS), B * R)``; scores outside the row's range are -inf."""
    wait_for_predecessor(OVERLAP)
    part, index = tl.program_id(0), tl.program_id(1)
    row = index // sets
    end = tl.load(seq_lens + row)
    start = tl.load(starts + row) if PADDED else 0
    first = part * TOKENS
    token = first + tl.arange(0, TOKENS)
    there = (token >= start) & (token < end)
    target = scores + index.to(tl.int64) * width + token
    if (first < end) & (first + TOKENS > start):
        score = summed_scores(
            logits, lse, index, token, start, end, logits_width, log2e,
            HEADS, ROWS, SOFTMAX, TOKENS, VECTOR,
        )  # fmt: skip
        tl.store(target, tl.where(there, score, float("-inf")), mask=token < width)
    else:
        tl.store(target, tl.full([TOKENS], float("-inf"), tl.float32), mask=token < width)


def empty_rows(batch: int, rows: int, width: int, device: torch.device) -> torch.Tensor:
    """Uninitialised ``[B, rows, width]`` fp32 with room behind every row, so that it starts aligned."""
    shape = (batch, rows, padded_width(width))
    return torch.empty(shape, dtype=torch.float32, device=device)[..., :width]


def score_tokens(
    logits: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sets: int,
    softmax: bool,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """Scores ``[B, R, W]`` fp32 from logits of `attend` ``[B, Hq, W]`` and ``lse [B, Hq]``."""
    batch, query_heads, width = logits.shape
    scores = torch.empty((batch, sets, width), dtype=torch.float32, device=logits.device)
    if batch == 0:
        return scores
    heads = query_heads // sets
    _score_kernel[(max(1, triton.cdiv(width, TOKENS)), batch * sets)](
        logits, lse, seq_lens, starts, scores, sets, width, logits.stride(1), LOG2E,
        HEADS=heads,
        ROWS=min(HEADS_AT_ONCE, triton.next_power_of_2(heads)),
        SOFTMAX=softmax,
        PADDED=starts is not None,
        TOKENS=TOKENS,
        VECTOR=tokens_a_thread(TOKENS, _WARPS),
        num_warps=_WARPS,
        **overlap(logits.device),
    )  # fmt: skip
    return scores
