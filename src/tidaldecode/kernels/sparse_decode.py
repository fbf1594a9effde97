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
_TINY = torch.finfo(torch.float32).tiny


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
    batch, query_heads, head_dim = q.shape
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
    grouped = (q.float() * scale).reshape(
        batch, max(sets, kv_heads), query_heads // max(sets, kv_heads), head_dim
    )
    for row, row_counts in enumerate(counts.tolist()):
        longest = max(row_counts)
        if longest == 0:
            continue
        chosen = positions[row, :, :longest].long()
        ragged = min(row_counts) < longest
        # A padded slot has to read something: any position that this row is known to hold.
        readable = torch.where(chosen < 0, positions[row].amax(), chosen) if ragged else chosen
        keys, values = (
            layout.gather(cache, block_table, row, readable).float() for cache in (k, v)
        )
        # Keys first: a product with few columns runs at memory speed, one with few rows does not.
        logits = torch.bmm(keys, grouped[row].transpose(1, 2)).transpose(1, 2).contiguous()
        if ragged:
            # What a padded slot read is nobody's: out with it, whatever it holds.
            empty = (chosen < 0).expand(logits.shape[0], -1)
            logits.masked_fill_(empty[:, None], -torch.inf)
            values = values.masked_fill(empty[..., None], 0)
        # The floors keep an empty set of a row at zero, where -inf - -inf and 0 / 0 would make NaN.
        peak = logits.amax(-1, keepdim=True).clamp(min=_LOWEST)
        weights = (logits - peak).exp_()
        total = weights.sum(-1, keepdim=True)
        out[row] = (torch.bmm(weights, values) / total.clamp(min=_TINY)).flatten(0, 1)
        lse[row] = (peak + total.log()).flatten()
    return out.to(q.dtype), lse
