"""dense_decode: the newest query of each sequence, or a few, against its whole cache; may score tokens.

The PyTorch path walks the cache once, in chunks that stay in the processor's cache, with all query
heads of a KV head, and all queries, in one product (KV heads are never repeated). Chunks are merged by
their largest logits and sums (Milakov & Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

import math

import torch

from tidaldecode.errors import TidalError
from tidaldecode.kernels import layout
from tidaldecode.kernels.contract import (
    ScoreKind,
    check_attention_inputs,
    check_rows,
    check_score_kind,
    row_ranges,
)
from tidaldecode.kernels.dispatch import resolve_backend
from tidaldecode.kernels.partition import parts
from tidaldecode.processor import is_intel

_CHUNK_LOGITS = 1 << 18
"""Logits of one chunk: one megabyte; twice as many where one buffer does instead of two."""


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
    """Full attention of one query per sequence, or a few. Contract: `tidaldecode.kernels`.

    Args:
        q: ``[B, Hq, D]``, the newest token's query; or ``[B, T, Hq, D]``, those of the ``T`` newest
            tokens, of which number ``t`` sees ``starts <= p < seq_lens - (T - 1 - t)``. K and V are
            read once for all of them. (On a GPU the query heads of a KV head, ``T * G``, may fill
            several tiles, of 128 in half precision for D up to 128, of 64 beyond, of 32 in fp32; each
            then reads them, all but the first from the GPU's cache.)
        scores: emit a score for every token as well: the softmax probability summed over all query
            heads (``"shared"``, R = 1), over the heads of each KV head (``"kv_head"``, R = Hkv), of
            each query head (``"query_head"``, R = Hq), or the scaled logit of each query head
            (``"query_head_logits"``, R = Hq). For ``q [B, Hq, D]`` only.

    Returns:
        ``out`` like q, ``lse`` fp32 like q without D, and ``token_scores [B, R, W]`` fp32 or None, where
        W >= max(seq_lens); positions outside a row's range hold -inf. Scores of fp32 queries are fp32's.
        In half precision a GPU keeps a logit as its distance from the logit of the row's first token,
        which loses up to 2**-11 of that distance; plain bf16 attention loses 2**-8 of the logit.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    kv_heads = check_attention_inputs(q, k, v, block_table, several=True)
    batch, query_heads, head_dim = len(q), q.shape[-2], q.shape[-1]
    check_rows(seq_lens, starts, batch, q.device)
    if scores is not None and q.dim() == 4:
        raise TidalError(
            f"scores: expected None for several queries of a row (q {list(q.shape)}), got {scores!r}; "
            "pass the newest query alone as [B, Hq, D]"
        )
    sets = 0 if scores is None else check_score_kind(scores, kv_heads, query_heads)
    group = query_heads // kv_heads
    chosen = resolve_backend(
        backend,
        q.device,
        dtype=q.dtype,
        head_dim=head_dim,
        group=group,
        in_rows=q.dim() == 3 and layout.in_rows(k, v, block_table),
    )
    if chosen == "triton":
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

    queries = 1 if q.dim() == 3 else q.shape[1]
    out = torch.zeros(batch, queries, query_heads, head_dim, device=q.device)
    lse = torch.full(out.shape[:3], -torch.inf, device=q.device)
    token_scores = None
    if scores is not None:
        width = max((end for _, end in ranges), default=0)
        token_scores = torch.full((batch, sets, width), -torch.inf, device=q.device)
    # [B, Hkv, T * G, D]: the queries of a KV head side by side.
    grouped = (q.float() * scale).reshape(batch, queries, kv_heads, group, head_dim)
    grouped = grouped.transpose(1, 2).flatten(2, 3)
    by_query = (kv_heads, queries, group, head_dim)
    later = torch.arange(queries, device=q.device).repeat_interleave(group)
    for row, (start, end) in enumerate(ranges):
        if start == end:
            continue
        if chosen == "numba":
            from tidaldecode.kernels.numba import rows

            found = rows.dense_row(grouped[row], k[row], v[row], start, end, keep=scores, sets=sets)
        else:
            limits = None if queries == 1 else end - queries + 1 + later
            found = _dense_row(
                grouped[row], k, v, block_table, row, start, end, keep=scores, limits=limits
            )
        row_out, row_lse, row_scores = found
        out[row] = row_out.view(by_query).transpose(0, 1).flatten(1, 2)
        lse[row] = row_lse.view(by_query[:3]).transpose(0, 1).flatten(1, 2)
        if token_scores is not None and row_scores is not None:
            token_scores[row, :, start:end] = row_scores
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:-1]), token_scores


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
    limits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention of one row. ``q [Hkv, G, D]`` fp32, scaled; ``limits [G]``: where what they see ends.

    Returns ``out [Hkv, G, D]``, ``lse [Hkv, G]`` and, with ``keep``, scores ``[R, end - start]``.
    """
    kv_heads, group, _ = q.shape
    length = end - start
    # MKL's products of few rows with many keys run at memory speed, but on Intel's processors alone.
    queries_first = q.device.type == "cpu" and is_intel()
    logits_at_once = _CHUNK_LOGITS << queries_first
    chunk = min(length, max(1, logits_at_once // (kv_heads * group)))
    usual = -(-length // chunk)
    if parts(usual) != usual:
        chunk = -(-length // parts(usual))
    # One or two buffers for all chunks: memory given back and taken anew costs a page fault a page.
    products = torch.empty(0 if queries_first else chunk * kv_heads * group, device=q.device)
    buffer = torch.empty((chunk if keep is None else length) * kv_heads * group, device=q.device)
    outs, peaks, totals, scored = [], [], [], []
    for first in range(start, end, chunk):
        last = min(first + chunk, end)
        keys = layout.read_range(k, block_table, row, first, last).float()
        values = layout.read_range(v, block_table, row, first, last).float()
        offset = 0 if keep is None else (first - start) * kv_heads * group
        weights = _cut(buffer, offset, (kv_heads, group, last - first))
        if queries_first:
            torch.bmm(q, keys.transpose(1, 2), out=weights)
        else:
            # A product with few columns runs at memory speed everywhere else.
            logits = _cut(products, 0, (kv_heads, last - first, group))
            torch.bmm(keys, q.transpose(1, 2), out=logits)
            weights.copy_(logits.transpose(1, 2))
        if limits is not None:
            hidden = torch.arange(first, last, device=q.device) >= limits[:, None]
            weights.masked_fill_(hidden, -torch.inf)
        kept = weights.clone() if keep == "query_head_logits" else weights
        peak = weights.amax(-1)
        # One call, several times as fast as its parts. Its largest weight is 1 over the sum.
        torch.softmax(weights, -1, out=weights)
        total = weights.amax(-1).reciprocal()
        if limits is not None:
            # A query may see nothing of a chunk: what came out of softmax is NaN then.
            unseen = limits <= first
            weights.masked_fill_(unseen[:, None], 0.0)
            total.masked_fill_(unseen, 0.0)
            peak.masked_fill_(unseen, torch.finfo(torch.float32).min)
        outs.append(torch.bmm(weights, values))
        peaks.append(peak)
        totals.append(total)
        if keep is not None:
            scored.append((kept, peak + total.log()))
    highest = torch.stack(peaks).amax(0)
    shares = (torch.stack(peaks) - highest).exp() * torch.stack(totals)
    whole = shares.sum(0)
    out = (torch.stack(outs) * shares[..., None]).sum(0)
    seen = whole if limits is None else torch.where(whole > 0, whole, 1.0)
    lse = highest + whole.log()
    scores = [_score_chunk(kept, chunk_lse - lse, keep) for kept, chunk_lse in scored]
    return out / seen[..., None], lse, torch.cat(scores, 1) if scores else None


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
