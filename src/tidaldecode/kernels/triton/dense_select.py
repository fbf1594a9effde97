"""dense_select in Triton: attention keeps its logits, and their scores are counted as they are made."""

from __future__ import annotations

import torch

from tidaldecode.kernels.scratch import Scratch
from tidaldecode.kernels.select_tokens import Selection
from tidaldecode.kernels.triton.dense_decode import attend
from tidaldecode.kernels.triton.score_tokens import empty_scores
from tidaldecode.kernels.triton.select_tokens import select_tokens


def dense_select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sets: int,
    softmax: bool,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor, Selection]:
    """Twin of `tidaldecode.kernels.dense_select`."""
    results, logits = attend(
        q, k, v, seq_lens, scale=scale, starts=starts, block_table=block_table, keep_logits=True
    )
    assert logits is not None
    selection = select_tokens(
        empty_scores(len(q), sets, logits.distances.shape[2], q.device),
        seq_lens,
        attended=(results, logits),
        softmax=softmax,
        budget=budget,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        starts=starts,
        scratch=scratch,
    )
    return results.out, results.lse, selection
