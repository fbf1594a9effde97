"""dense_output: what `dense_decode` returns first, for layers that need nothing else."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from tidaldecode.kernels import layout
from tidaldecode.kernels.contract import check_attention_inputs, check_rows, row_ranges
from tidaldecode.kernels.dense_decode import dense_decode
from tidaldecode.kernels.dispatch import resolve_backend
from tidaldecode.kernels.partition import is_other
from tidaldecode.processor import is_intel


def dense_output(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Full attention of one query per sequence, ``out [B, Hq, D]``. Contract: `tidaldecode.kernels`.

    Torch's fused attention, which tells no log-sum-exp, is taken where it is faster than `dense_decode`.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    kv_heads = check_attention_inputs(q, k, v, block_table)
    batch, query_heads, head_dim = q.shape
    group = query_heads // kv_heads
    chosen = resolve_backend(
        backend,
        q.device,
        dtype=q.dtype,
        head_dim=head_dim,
        group=group,
        in_rows=layout.in_rows(k, v, block_table),
    )
    if chosen != "torch" or not _fused_is_faster(q, k, v, kv_heads):
        out, _, _ = dense_decode(
            q,
            k,
            v,
            seq_lens,
            scale=scale,
            starts=starts,
            block_table=block_table,
            backend=backend,
        )
        return out
    check_rows(seq_lens, starts, batch, q.device)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for row, (start, end) in enumerate(
        row_ranges(seq_lens, starts, batch, layout.capacity(k, block_table))
    ):
        if start == end:
            continue
        keys = layout.read_range(k, block_table, row, start, end)
        values = layout.read_range(v, block_table, row, start, end)
        # The query heads of a KV head as if they were queries one after another: it is read once.
        grouped = q[row].view(1, kv_heads, group, head_dim)
        found = scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
        out[row] = found.view(query_heads, head_dim)
    return out


def _fused_is_faster(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_heads: int) -> bool:
    """Measured on Intel's processors (8.9 for 10.6 ms) and AMD's (13 for 9.9); it splits no head."""
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.float32
        and k.stride(-1) == v.stride(-1) == 1
        and torch.get_num_threads() <= kv_heads
        and is_intel()
        and not is_other()
    )
