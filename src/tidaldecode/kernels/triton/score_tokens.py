"""From kept logits to token scores, and into the selection's histograms while they are at hand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor
from tidaldecode.kernels.triton._radix import BINS, token_key
from tidaldecode.kernels.triton._splitk import LN2, LOG2E
from tidaldecode.kernels.triton.select_tokens import SelectionBuffers, count_bins

TOKENS = 256
"""Tokens of one program."""
_HEADS_AT_ONCE = 32


@triton.jit
def _score_kernel(
    logits, lse, seq_lens, starts, scores, histograms, listed,
    sets, width, sinks, recents, log2e,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    COPIES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(W / TOKENS), B * R)``: scores of some tokens of one set, over its ``HEADS`` heads.

    With ``COUNT`` the tokens' bins are added to the histograms, and scores outside the row's range stay
    void; without it they are -inf.
    """
    wait_for_predecessor(OVERLAP)
    part, index = tl.program_id(0), tl.program_id(1)
    row = index // sets
    end = tl.load(seq_lens + row)
    start = tl.load(starts + row) if PADDED else 0
    first = part * TOKENS
    if COUNT and part == 0:
        tl.store(listed + index, 0)
    token = first + tl.arange(0, TOKENS)
    there = (token >= start) & (token < end)
    target = scores + index.to(tl.int64) * width + token
    if (first < end) & (first + TOKENS > start):
        score = tl.zeros([TOKENS], tl.float32)
        for low in tl.static_range(0, HEADS, ROWS):
            head = low + tl.arange(0, ROWS)
            query = index.to(tl.int64) * HEADS + head
            valid = (head < HEADS)[:, None] & there[None, :]
            logit = tl.load(
                logits + query[:, None] * width + token[None, :], mask=valid, other=float("-inf")
            )
            if SOFTMAX:
                total = tl.load(lse + query, mask=head < HEADS, other=0.0) * log2e
                # An empty row's log-sum-exp is -inf, but then no token is there.
                score += tl.sum(tl.where(valid, tl.exp2(logit - total[:, None]), 0.0), 0)
            else:
                score += tl.sum(tl.where(valid, logit * LN2, 0.0), 0)
        if COUNT:
            tl.store(target, score, mask=there)
            key = token_key(score, token, start, end, sinks, recents)
            count_bins(key, there, histograms + index * COPIES * BINS, part, COPIES)
        else:
            tl.store(target, tl.where(there, score, float("-inf")), mask=token < width)
    elif not COUNT:
        tl.store(target, tl.full([TOKENS], float("-inf"), tl.float32), mask=token < width)


def score_tokens(
    logits: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sets: int,
    softmax: bool,
    starts: torch.Tensor | None,
    selection: SelectionBuffers | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> torch.Tensor:
    """Scores ``[B, R, W]`` fp32 from logits in units of log 2 ``[B, Hq, W]`` and ``lse [B, Hq]``.

    With ``selection`` its histograms are filled, and scores outside a row's range stay void; without
    it they are -inf.
    """
    batch, query_heads, width = logits.shape
    scores = torch.empty((batch, sets, width), dtype=torch.float32, device=logits.device)
    if batch == 0:
        return scores
    count = selection is not None
    heads = query_heads // sets
    _score_kernel[(max(1, triton.cdiv(width, TOKENS)), batch * sets)](
        logits, lse, seq_lens, starts, scores,
        selection.histograms if selection else None,
        selection.listed if selection else None,
        sets, width, sink_tokens, recent_tokens, LOG2E,
        HEADS=heads,
        ROWS=min(_HEADS_AT_ONCE, triton.next_power_of_2(heads)),
        SOFTMAX=softmax,
        COUNT=count,
        PADDED=starts is not None,
        TOKENS=TOKENS,
        COPIES=selection.copies if selection else 1,
        num_warps=4,
        **overlap(logits.device),
    )  # fmt: skip
    return scores
