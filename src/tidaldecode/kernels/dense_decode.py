"""dense_decode: one query per sequence against its whole cache; may also score every token.

The PyTorch path walks the cache once, in chunks that stay in the processor's cache, with all query
heads of a KV head in one product (KV heads are never repeated) and an online softmax over chunks
(Milakov & Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

import math

import torch

from tidaldecode.kernels import layout
from tidaldecode.kernels.contract import (
    ScoreKind,
    check_attention_inputs,
    check_rows,
    check_score_kind,
    row_ranges,
)
from tidaldecode.kernels.dispatch import resolve_backend

_CHUNK_LOGITS = 1 << 18
"""Logits of one chunk: one megabyte."""


def dense_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scores: ScoreKind | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Full attention of one query per sequence. Contract: `tidaldecode.kernels`.

    Args:
        scores: emit a score for every token as well: the softmax probability summed over all query
            heads (``"shared"``, R = 1), over the heads of each KV head (``"kv_head"``, R = Hkv), of
            each query head (``"query_head"``, R = Hq), or the scaled logit of each query head
            (``"query_head_logits"``, R = Hq).

    Returns:
        ``out [B, Hq, D]``, ``lse [B, Hq]`` fp32, and ``token_scores [B, R, W]`` fp32 or None, where
        W >= max(seq_lens); positions outside a row's range hold -inf.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    kv_heads = check_attention_inputs(q, k, v, block_table)
    batch, query_heads, head_dim = q.shape
    check_rows(seq_lens, starts, batch, q.device)
    sets = 0 if scores is None else check_score_kind(scores, kv_heads, query_heads)
    group = query_heads // kv_heads
    if (
        resolve_backend(backend, q.device, dtype=q.dtype, head_dim=head_dim, group=group)
        == "triton"
    ):
        from tidaldecode.kernels.triton import dense_decode as twin

        return twin.dense_decode(
            q,
            k,
            v,
            seq_lens,
            scale=scale,
            starts=starts,
            block_table=block_table,
            scores=scores,
            sets=sets,
        )
    ranges = row_ranges(seq_lens, starts, batch, layout.capacity(k, block_table))

    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    token_scores = None
    if scores is not None:
        width = max((end for _, end in ranges), default=0)
        token_scores = torch.full((batch, sets, width), -torch.inf, device=q.device)
    grouped = (q.float() * scale).reshape(batch, kv_heads, query_heads // kv_heads, head_dim)
    for row, (start, end) in enumerate(ranges):
        if start == end:
            continue
        row_out, row_lse, parts = _dense_row(
            grouped[row], k, v, block_table, row, start, end, keep=scores
        )
        out[row] = row_out.flatten(0, 1)
        lse[row] = row_lse.flatten()
        if token_scores is not None:
            for first, chunk, chunk_lse in parts:
                token_scores[row, :, first : first + chunk.shape[2]] = _score_chunk(
                    chunk, chunk_lse - row_lse, scores
                )
    return out.to(q.dtype), lse, token_scores


def _dense_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    row: int,
    start: int,
    end: int,
    *,
    keep: ScoreKind | None,
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Attention of one row. ``q [Hkv, G, D]`` fp32, scaled.

    Returns ``out [Hkv, G, D]``, ``lse [Hkv, G]`` and, with ``keep``, for every chunk its first
    position, what its scores are made of (the chunk's own softmax, or logits if those are the scores)
    ``[Hkv, G, C]`` and its log-sum-exp ``[Hkv, G]``.
    """
    kv_heads, group, _ = q.shape
    length = end - start
    chunk = min(length, max(1, _CHUNK_LOGITS // (kv_heads * group)))
    # Two buffers, not two a chunk: memory given back and taken anew costs a page fault a page.
    products = torch.empty(chunk * kv_heads * group, device=q.device)
    buffer = torch.empty((chunk if keep is None else length) * kv_heads * group, device=q.device)
    out = torch.zeros_like(q)
    peak = torch.full((kv_heads, group), -torch.inf, device=q.device)
    total = torch.zeros_like(peak)
    parts = []
    for first in range(start, end, chunk):
        last = min(first + chunk, end)
        keys = layout.read_range(k, block_table, row, first, last).float()
        values = layout.read_range(v, block_table, row, first, last).float()
        # Keys first: a product with few columns runs at memory speed, one with few rows does not.
        logits = _cut(products, 0, (kv_heads, last - first, group))
        torch.bmm(keys, q.transpose(1, 2), out=logits)
        offset = 0 if keep is None else (first - start) * kv_heads * group
        weights = _cut(buffer, offset, (kv_heads, group, last - first))
        weights.copy_(logits.transpose(1, 2))
        kept = weights.clone() if keep == "query_head_logits" else weights
        chunk_peak = weights.amax(-1)
        # One call, several times as fast as its parts. Its largest weight is 1 over the sum.
        torch.softmax(weights, -1, out=weights)
        chunk_total = weights.amax(-1).reciprocal()
        new_peak = torch.maximum(peak, chunk_peak)
        old_scale, new_scale = (peak - new_peak).exp(), (chunk_peak - new_peak).exp() * chunk_total
        out = out * old_scale[..., None] + torch.bmm(weights, values) * new_scale[..., None]
        total = total * old_scale + new_scale
        peak = new_peak
        if keep is not None:
            parts.append((first, kept, chunk_peak + chunk_total.log()))
    return out / total[..., None], peak + total.log(), parts


def _cut(buffer: torch.Tensor, offset: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """A piece of a flat buffer as a contiguous tensor."""
    return buffer[offset : offset + math.prod(shape)].view(shape)


def _score_chunk(
    kept: torch.Tensor, log_scale: torch.Tensor, kind: ScoreKind | None
) -> torch.Tensor:
    """Scores ``[R, C]`` of one chunk: ``kept [Hkv, G, C]``, times ``exp(log_scale [Hkv, G])``."""
    if kind == "query_head_logits":
        return kept.flatten(0, 1)
    scale = log_scale.exp()
    if kind == "query_head":
        return (kept * scale[..., None]).flatten(0, 1)
    per_kv_head = torch.bmm(scale[:, None], kept).squeeze(1)
    return per_kv_head.sum(0, keepdim=True) if kind == "shared" else per_kv_head
