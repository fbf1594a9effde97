"""Attention of one row, as `dense_decode` and `sparse_decode` ask for it, in Numba's loops."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from tidaldecode.kernels.contract import ScoreKind
from tidaldecode.kernels.numba import _loops
from tidaldecode.kernels.partition import parts

if numba.config.THREADING_LAYER == "default":
    # Several threads of a program may decode at a time.
    numba.config.THREADING_LAYER = "threadsafe"

_LN2 = math.log(2)
_PART = 2048
"""Tokens of a part, whatever the number of threads: sums are rounded alike with any."""
_EVERY = np.empty((1, 0), np.int64)
"""No choice of tokens."""


def dense_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    end: int,
    *,
    keep: ScoreKind | None,
    sets: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``q [Hkv, G, D]`` fp32, scaled, against the tokens ``start <= t < end`` of ``k, v [Hkv, S, D]``.

    Returns ``out [Hkv, G, D]``, ``lse [Hkv, G]`` and, with ``keep``, scores ``[sets, end - start]``.
    """
    length = end - start
    logits = np.empty((*q.shape[:2], 0 if keep is None else length), np.float32)
    out, lse = _attend(q, k, v, _EVERY, start, np.array([end]), length, logits)
    if keep is None:
        return out, lse, None
    kept = logits.reshape(-1, length)
    if keep == "query_head_logits":
        return out, lse, torch.from_numpy(kept).mul_(_LN2)
    scores = np.empty((sets, length), np.float32)
    _loops.sum_weights(kept, lse.flatten().numpy(), scores)
    return out, lse, torch.from_numpy(scores)


def sparse_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    padded: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q [H, G, D]`` fp32, scaled, against the tokens ``chosen [H or 1, N]`` int64 of a row's k and v.

    ``padded``, of chosen's shape, marks slots that are nobody's. Returns ``out [H, G, D]`` and
    ``lse [H, G]``.
    """
    length = chosen.shape[1]
    counts = np.array([length])
    if padded is not None:
        counts = (~padded).sum(1).numpy()
        chosen = chosen.gather(1, padded.int().argsort(dim=1, stable=True))
    nothing = np.empty((*q.shape[:2], 0), np.float32)
    return _attend(q, k, v, chosen.contiguous().numpy(), 0, counts, length, nothing)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: np.ndarray,
    start: int,
    ends: np.ndarray,
    length: int,
    logits: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_loops.attend` of up to ``length`` tokens, and its parts merged."""
    sets, heads, channels = q.shape
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    stretch = -(-length // parts(-(-length // _PART)))
    count = -(-length // stretch)
    outs = np.empty((sets * count, heads, channels), np.float32)
    lses = np.empty((sets * count, heads), np.float32)
    _loops.attend(
        q.detach().contiguous().numpy(), _flat(k), _flat(v), *k.stride()[:2], *v.stride()[:2],
        sets // len(k), tokens, start, ends, count, stretch, logits, outs, lses,
    )  # fmt: skip
    out, lse = torch.from_numpy(outs), torch.from_numpy(lses)
    if count == 1:
        return out, lse
    out, lse = out.view(sets, count, heads, channels), lse.view(sets, count, heads)
    whole = lse.logsumexp(1, keepdim=True)
    # A head of no tokens has only empty parts, whose outputs are 0.
    weights = (lse - whole.clamp(min=torch.finfo(torch.float32).min)).exp()
    return (out * weights[..., None]).sum(1), whole.squeeze(1)


def _flat(cache: torch.Tensor) -> np.ndarray:
    """The memory from a tensor's first element to its last; its channels follow one another."""
    extent = 1 + sum(
        (n - 1) * stride for n, stride in zip(cache.shape, cache.stride(), strict=True)
    )
    return cache.detach().as_strided((extent,), (1,)).numpy()
