"""The checks that every kernel makes on its arguments, whatever the backend."""

from __future__ import annotations

from typing import Literal

import torch

from tidaldecode.errors import TidalError, check_tensor

ScoreKind = Literal["shared", "kv_head", "query_head", "query_head_logits"]
SCORE_KINDS: tuple[ScoreKind, ...] = ("shared", "kv_head", "query_head", "query_head_logits")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_attention_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    *,
    several: bool = False,
) -> int:
    """Check ``q, k, v`` and ``block_table`` against the contract; return ``Hkv``.

    With ``several``, ``q`` may also be ``[B, T, Hq, D]``.

    Errors: `TidalError` naming the argument, what was expected and what was found.
    """
    dims = 4 if several and getattr(q, "ndim", 3) == 4 else 3
    check_tensor("q", q, (None,) * dims, dtypes=FLOAT_DTYPES, device=q.device)
    if dims == 4 and q.shape[1] == 0:
        raise TidalError(f"q: expected at least one query in each row, got shape {list(q.shape)}")
    batch, query_heads, head_dim = len(q), q.shape[-2], q.shape[-1]
    if block_table is None:
        check_tensor("k", k, (batch, None, None, head_dim), dtypes=(q.dtype,), device=q.device)
        kv_heads = k.shape[1]
    else:
        check_tensor("k", k, (None, None, None, head_dim), dtypes=(q.dtype,), device=q.device)
        check_tensor(
            "block_table", block_table, (batch, None), dtypes=(torch.int32,), device=q.device
        )
        kv_heads = k.shape[2]
    check_tensor("v", v, tuple(k.shape), dtypes=(q.dtype,), device=q.device)
    if kv_heads == 0 or query_heads % kv_heads:
        raise TidalError(
            f"q: expected a number of query heads divisible by the {kv_heads} KV heads of k, "
            f"got {query_heads}"
        )
    return kv_heads


def check_score_kind(scores: str, kv_heads: int, query_heads: int) -> int:
    """The number of sets per sequence, R, that a kind of scores has. Errors: `TidalError`."""
    if scores not in SCORE_KINDS:
        raise TidalError(f"scores: expected one of {', '.join(SCORE_KINDS)}, got {scores!r}")
    return {"shared": 1, "kv_head": kv_heads}.get(scores, query_heads)


def check_budget(budget: int, sink_tokens: int, recent_tokens: int) -> None:
    """Check that the tokens that are always selected fit. Errors: `TidalError`."""
    if min(sink_tokens, recent_tokens) < 0 or budget < sink_tokens + recent_tokens + 1:
        raise TidalError(
            "budget: expected at least sink_tokens + recent_tokens + 1 = "
            f"{sink_tokens + recent_tokens + 1} tokens, got {budget}"
        )


def check_rows(
    seq_lens: torch.Tensor, starts: torch.Tensor | None, batch: int, device: torch.device
) -> None:
    """Check the tensors that say where rows begin and end; their values stay on the device.

    Errors: `TidalError` naming the argument, what was expected and what was found.
    """
    check_tensor("seq_lens", seq_lens, (batch,), dtypes=(torch.int32,), device=device)
    if starts is not None:
        check_tensor("starts", starts, (batch,), dtypes=(torch.int32,), device=device)


def row_ranges(
    seq_lens: torch.Tensor, starts: torch.Tensor | None, batch: int, capacity: int
) -> list[tuple[int, int]]:
    """``(start, end)`` of every row on the host. A CUDA tensor synchronises here.

    Errors: `TidalError` for an end beyond ``capacity`` or before the start.
    """
    ends = seq_lens.tolist()
    begins = [0] * batch if starts is None else starts.tolist()
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if not 0 <= begin <= end <= capacity:
            raise TidalError(
                f"seq_lens: expected 0 <= starts <= seq_lens <= {capacity} (what the cache or the "
                f"scores hold), got starts={begin} and seq_lens={end} in row {row}"
            )
    return list(zip(begins, ends, strict=True))
