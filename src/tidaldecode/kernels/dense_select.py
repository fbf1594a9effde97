"""dense_select: what a token selection layer does, in one call: full attention, and its best tokens."""

from __future__ import annotations

import torch

from tidaldecode.kernels import layout
from tidaldecode.kernels.contract import (
    ScoreKind,
    check_attention_inputs,
    check_budget,
    check_rows,
    check_score_kind,
)
from tidaldecode.kernels.dense_decode import dense_decode
from tidaldecode.kernels.dispatch import resolve_backend
from tidaldecode.kernels.scratch import Scratch
from tidaldecode.kernels.select_tokens import Selection, select_tokens


def dense_select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    scores: ScoreKind,
    budget: int,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    backend: str = "auto",
    scratch: Scratch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Selection]:
    """`dense_decode` with ``scores``, and `select_tokens` of them. Contract: `tidaldecode.kernels`.

    In Triton the scores are counted where they are made, which saves a launch and a pass over them.

    Returns:
        ``out [B, Hq, D]``, ``lse [B, Hq]`` fp32 and the selection.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    kv_heads = check_attention_inputs(q, k, v, block_table)
    sets = check_score_kind(scores, kv_heads, q.shape[1])
    check_budget(budget, sink_tokens, recent_tokens)
    check_rows(seq_lens, starts, len(q), q.device)
    group = q.shape[1] // kv_heads
    chosen = resolve_backend(
        backend,
        q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        group=group,
        in_rows=layout.in_rows(k, v, block_table),
    )
    if chosen == "triton":
        from tidaldecode.kernels.triton import dense_select as twin

        return twin.dense_select(
            q,
            k,
            v,
            seq_lens,
            scale=scale,
            sets=sets,
            softmax=scores != "query_head_logits",
            budget=budget,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            starts=starts,
            block_table=block_table,
            scratch=scratch or Scratch(),
        )
    out, lse, token_scores = dense_decode(
        q,
        k,
        v,
        seq_lens,
        scale=scale,
        starts=starts,
        block_table=block_table,
        scores=scores,
        backend=chosen,
    )
    assert token_scores is not None
    return (
        out,
        lse,
        select_tokens(
            token_scores,
            seq_lens,
            budget=budget,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            starts=starts,
            backend="torch",
        ),
    )
