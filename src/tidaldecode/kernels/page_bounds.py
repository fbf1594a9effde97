"""page_bound_scores: an upper bound of every token's logit, from the extremes of its page.

The scorer of Quest (Tang et al., arXiv 2406.10774, section 3.3): a page keeps the smallest and the
largest value of each key channel, and no key of the page can beat ``sum_d max(q_d lo_d, q_d hi_d)``.
A baseline of quality: the bounds are made anew from the keys here, which Quest's cache keeps ready.
"""

from __future__ import annotations

import torch

from tidaldecode.errors import TidalError
from tidaldecode.kernels import layout
from tidaldecode.kernels.contract import check_attention_inputs, check_rows, row_ranges
from tidaldecode.kernels.dispatch import resolve_backend


def page_bound_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    page_tokens: int = 16,
    starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Scores ``[B, Hq, W]`` fp32: the bound of the page that a token lies in.

    Pages are counted from a row's first valid token; the last one may be short. Positions outside a
    row's range hold -inf; W is the largest of ``seq_lens``. ``v`` is only checked.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    kv_heads = check_attention_inputs(q, k, v, block_table)
    if page_tokens < 1:
        raise TidalError(f"page_tokens: expected a number from 1 up, got {page_tokens}")
    resolve_backend(backend, q.device, twin=False)
    check_rows(seq_lens, starts, len(q), q.device)
    batch, query_heads, head_dim = q.shape
    ranges = row_ranges(seq_lens, starts, batch, layout.capacity(k, block_table))
    width = max((end for _, end in ranges), default=0)
    scores = torch.full((batch, query_heads, width), -torch.inf, device=q.device)
    grouped = (q.float() * scale).reshape(batch, kv_heads, query_heads // kv_heads, head_dim)
    for row, (start, end) in enumerate(ranges):
        if start == end:
            continue
        keys = layout.read_range(k, block_table, row, start, end).float()
        low, high = _bounds(keys, page_tokens)
        up, down = grouped[row].clamp(min=0), grouped[row].clamp(max=0)
        bounds = up @ high.transpose(1, 2) + down @ low.transpose(1, 2)
        tokens = bounds.flatten(0, 1).repeat_interleave(page_tokens, dim=-1)
        scores[row, :, start:end] = tokens[:, : end - start]
    return scores


def _bounds(keys: torch.Tensor, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of every channel of every page, ``[Hkv, pages, D]`` each."""
    kv_heads, length, head_dim = keys.shape
    whole = length // page_tokens * page_tokens
    pages = keys[:, :whole].reshape(kv_heads, -1, page_tokens, head_dim)
    low, high = pages.amin(2), pages.amax(2)
    if whole < length:
        rest = keys[:, whole:]
        low = torch.cat([low, rest.amin(1, keepdim=True)], dim=1)
        high = torch.cat([high, rest.amax(1, keepdim=True)], dim=1)
    return low, high
