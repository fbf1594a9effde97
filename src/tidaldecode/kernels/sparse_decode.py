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
from tidaldecode.processor import is_intel

_LOWEST = torch.finfo(torch.float32).min
_TINY = torch.finfo(torch.float32).tiny
_GATHERED_ELEMENTS = 1 << 19
"""Elements gathered at a time: two megabytes in fp32."""


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    *,
    scale: float,
    block_table: torch.Tensor | None = None,
    whole_lens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over ``selection``. Contract: `tidaldecode.kernels`.

    With R = 1 every head reads the same tokens, with R = Hkv each KV head its own, with R = Hq each
    query head its own. Positions must lie inside the row's valid range; -1 is skipped.

    Args:
        whole_lens: ``[B]`` int32 or None. A row whose entry is n > 0 attends to its first n tokens
            instead, whatever was selected for it.
        out: where the output goes, contiguous and as ``q`` otherwise; new memory by default.

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
    if whole_lens is not None:
        check_tensor("whole_lens", whole_lens, (batch,), dtypes=int32, device=q.device)
    if out is not None:
        check_tensor("out", out, tuple(q.shape), dtypes=(q.dtype,), device=q.device)
        if not out.is_contiguous():
            raise TidalError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    group = query_heads // max(sets, kv_heads)
    resolved = resolve_backend(
        backend,
        q.device,
        dtype=q.dtype,
        head_dim=head_dim,
        group=group,
        in_rows=layout.in_rows(k, v, block_table),
    )
    if resolved == "triton":
        from tidaldecode.kernels.triton import sparse_decode as twin

        return twin.sparse_decode(
            q,
            k,
            v,
            selection,
            scale=scale,
            block_table=block_table,
            whole_lens=whole_lens,
            out=out,
        )
    found = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full((batch, query_heads), -torch.inf, dtype=torch.float32, device=q.device)
    grouped = (q.float() * scale).reshape(
        batch, max(sets, kv_heads), query_heads // max(sets, kv_heads), head_dim
    )
    capacity = layout.capacity(k, block_table)
    whole = [0] * batch if whole_lens is None else whole_lens.tolist()
    for row, row_counts in enumerate(counts.tolist()):
        chosen = positions[row, :, : max(row_counts)].long()
        if whole[row] > 0:
            chosen = torch.arange(whole[row], device=q.device)[None]
        if chosen.numel() == 0:
            continue
        lowest, highest = (int(bound) for bound in chosen.aminmax())
        if (whole[row] <= 0 and max(row_counts) > positions.shape[2]) or highest >= capacity:
            raise TidalError(
                f"selection: expected at most {positions.shape[2]} positions below {capacity} (the "
                f"cache's capacity) in row {row}, got {max(row_counts)} up to {highest}"
            )
        if highest < 0:
            continue
        # A padded slot has to read something: any position that this row is known to hold.
        padded = chosen < 0 if lowest < 0 else None
        if padded is not None:
            chosen = chosen.masked_fill(padded, highest)
        if resolved == "numba":
            from tidaldecode.kernels.numba import rows

            row_out, row_lse = rows.sparse_row(grouped[row], k[row], v[row], chosen, padded)
        else:
            row_out, row_lse = _sparse_row(grouped[row], k, v, block_table, row, chosen, padded)
        found[row], lse[row] = row_out.flatten(0, 1), row_lse.flatten()
    return (found.to(q.dtype) if out is None else out.copy_(found)), lse


def _sparse_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    row: int,
    chosen: torch.Tensor,
    padded: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one row: ``q [H, G, D]`` fp32, scaled, over ``chosen [H or 1, N]`` int64.

    ``padded``, of chosen's shape, marks slots that are nobody's. Returns ``out [H, G, D]`` and
    ``lse [H, G]``. A few heads are gathered at a time, so that their rows stay in the processor's
    cache until the product has read them.
    """
    sets = len(q)
    kv_heads = k.shape[1] if block_table is None else k.shape[2]
    heads = torch.arange(sets, device=q.device)[:, None] // (sets // kv_heads)
    step = max(1, _GATHERED_ELEMENTS // (chosen.shape[1] * q.shape[2]))

    def rows(cache: torch.Tensor, block: slice) -> torch.Tensor:
        positions = chosen if len(chosen) == 1 else chosen[block]
        return layout.gather(cache, block_table, row, heads[block], positions).float()

    blocks = [slice(first, first + step) for first in range(0, sets, step)]
    # The faster way round, as in dense_decode.
    if q.device.type == "cpu" and is_intel():
        found = [torch.bmm(q[block], rows(k, block).transpose(1, 2)) for block in blocks]
        logits = torch.cat(found)
    else:
        found = [torch.bmm(rows(k, block), q[block].transpose(1, 2)) for block in blocks]
        logits = torch.cat(found).transpose(1, 2).contiguous()
    if padded is not None:
        padded = padded.expand(sets, -1)
        logits.masked_fill_(padded[:, None], -torch.inf)
    # The floors keep an empty set of a row at zero, where -inf - -inf and 0 / 0 would make NaN.
    peak = logits.amax(-1, keepdim=True).clamp(min=_LOWEST)
    weights = (logits - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = []
    for block in blocks:
        values = rows(v, block)
        if padded is not None:
            values = values.masked_fill(padded[block][..., None], 0)
        out.append(torch.bmm(weights[block], values))
    return torch.cat(out) / total.clamp(min=_TINY), (peak + total.log()).squeeze(-1)
