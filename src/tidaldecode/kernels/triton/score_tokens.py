"""From kept logits to token scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.scratch import padded_width
from tidaldecode.kernels.triton._cache import ROW_ARGUMENTS
from tidaldecode.kernels.triton._logits import (
    HEADS_AT_ONCE,
    KeptLogits,
    summed_scores,
    tokens_a_thread,
)
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor

TOKENS = 256
"""Tokens of one program."""
_WARPS = 4


@triton.jit(do_not_specialize=["logits_width"], do_not_specialize_on_alignment=ROW_ARGUMENTS)
def _score_kernel(
    distances, origins, lse, seq_lens, starts, scores, sets, width, logits_width,
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
    index = tl.program_id(1)
    row = index // sets
    start = tl.load(starts + row) if PADDED else 0
    count = tl.load(seq_lens + row) - start
    first = tl.program_id(0) * TOKENS
    number = first + tl.arange(0, TOKENS)
    # From a row's first token on; what is before it comes last.
    token = start + number
    token = tl.where(token < width, token, token - width)
    target = scores + index.to(tl.int64) * width + token
    score = tl.full([TOKENS], float("-inf"), tl.float32)
    if first < count:
        found = summed_scores(
            distances, origins, None, None, lse, index, first, count, logits_width, 0, 0,
            HEADS, ROWS, SOFTMAX, False, 0, TOKENS, VECTOR,
        )  # fmt: skip
        score = tl.where(number < count, found, score)
    tl.store(target, score, mask=number < width)


def empty_scores(batch: int, sets: int, width: int, device: torch.device) -> torch.Tensor:
    """Uninitialised ``[B, R, W]`` fp32 with room behind every set, so that each starts aligned."""
    shape = (batch, sets, padded_width(width))
    return torch.empty(shape, dtype=torch.float32, device=device)[..., :width]


def score_tokens(
    logits: KeptLogits,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sets: int,
    softmax: bool,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """Scores ``[B, R, W]`` fp32 from logits and ``lse [B, Hq]`` of `attend`."""
    batch, query_heads, width = logits.distances.shape
    scores = torch.empty((batch, sets, width), dtype=torch.float32, device=lse.device)
    if batch == 0:
        return scores
    heads = query_heads // sets
    _score_kernel[(max(1, triton.cdiv(width, TOKENS)), batch * sets)](
        logits.distances, logits.origins, lse, seq_lens, starts, scores,
        sets, width, logits.distances.stride(1),
        HEADS=heads,
        ROWS=min(HEADS_AT_ONCE, triton.next_power_of_2(heads)),
        SOFTMAX=softmax,
        PADDED=starts is not None,
        TOKENS=TOKENS,
        VECTOR=tokens_a_thread(TOKENS, _WARPS),
        num_warps=_WARPS,
        **overlap(lse.device),
    )  # fmt: skip
    return scores
