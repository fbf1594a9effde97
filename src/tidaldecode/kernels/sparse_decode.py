"""sparse_decode: one query per sequence against its selected tokens only.

The PyTorch path gathers the selected rows, N of them and not S, and attends to those.
"""

from __future__ import annotations

import torch

from tidaldecode.errors import TidalError, check_tensor
from tidaldecode.kernels import layout
from tidaldecode.kernels.contract import check_attention_inputs
from tidaldecode.kernels.dispatch import resolve_backend
from tidaldecode.kernels.select_tokens import Selection

_LOWEST = torch.finfo(torch.float32).min


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    *,
    scale: float,
    block_table: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over ``selection``. Contract: `tidaldecode.kernels`.

    With R = 1 every head reads the same tokens, with R = Hkv each KV head its own, with R = Hq each
    query head its own. Positions must lie inside the row's valid range; -1 is skipped.

    Returns:
        ``out [B, Hq, D]`` in q's dtype and ``lse [B, Hq]`` fp32, over the selected tokens.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    kv_heads = check_attention_inputs(q, k, v, block_table)
    batch, query_heads, _ = q.shape
    positions, counts = selection.positions, selection.counts
    int32 = (torch.int32,)
    check_tensor(
        "selection.positions", positions, (batch, None, None), dtypes=int32, device=q.device
    )
    sets = positions.shape[1]
    check_tensor("selection.counts", counts, (batch, sets), dtypes=int32, device=q.device)
    if sets not in (1, kv_heads, query_heads):
        raise TidalError(
            f"selection: expected 1, Hkv={kv_heads} or Hq={query_heads} sets per sequence, got {sets}"
        )
    resolve_backend(backend)

    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full((batch, query_heads), -torch.inf, dtype=torch.float32, device=q.device)
    grouped = (q.float() * scale).reshape(batch, max(sets, kv_heads), -1, q.shape[2])
    for row, row_counts in enumerate(counts.tolist()):
        longest = max(row_counts)
        if longest == 0:
            continue
        chosen = positions[row, :, :longest].long()
        ragged = min(row_counts) < longest
        empty = chosen < 0
        if ragged:
            # A padded slot reads a row that is valid, then weighs it by zero.
            chosen = torch.where(empty, positions[row].amax().long(), chosen)
        keys, values = (_gather(cache, block_table, row, chosen, kv_heads) for cache in (k, v))
        logits = torch.bmm(grouped[row], keys.float().transpose(1, 2))
        if ragged:
            hidden = empty.repeat_interleave(logits.shape[0] // sets, 0)[:, None]
            logits.masked_fill_(hidden, -torch.inf)
        row_lse = logits.logsumexp(-1)
        # The floor keeps -inf - -inf from making NaN where one set of a row is empty.
        weights = (logits - row_lse.clamp(min=_LOWEST)[..., None]).exp()
        out[row] = torch.bmm(weights, values.float()).flatten(0, 1)
        lse[row] = row_lse.flatten()
    return out.to(q.dtype), lse


def _gather(
    cache: torch.Tensor,
    block_table: torch.Tensor | None,
    row: int,
    positions: torch.Tensor,
    kv_heads: int,
) -> torch.Tensor:
    """Rows of one sequence at positions ``[R, N]``: ``[max(R, Hkv), N, D]``."""
    if positions.shape[0] == 1:
        return layout.gather_shared(cache, block_table, row, positions[0])
    return layout.gather_per_head(cache, block_table, row, positions)
