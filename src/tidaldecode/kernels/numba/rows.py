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
    every = torch.empty(1, 0, dtype=torch.int64)
    logits = torch.empty(*q.shape[:2], 0 if keep is None else end - start)
    out, lse = _attend(q, k, v, every, start, torch.tensor([end]), end - start, logits)
    if keep is None:
        return out, lse * _LN2, None
    kept = logits.flatten(0, 1)
    if keep == "query_head_logits":
        return out, lse * _LN2, kept.mul_(_LN2)
    scores = torch.empty(sets, end - start)
    _loops.sum_weights(kept.numpy(), lse.flatten().numpy(), scores.numpy())
    return out, lse * _LN2, scores


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
    counts = torch.tensor([chosen.shape[1]])
    if padded is not None:
        counts = (~padded).sum(1)
        chosen = chosen.gather(1, padded.int().argsort(dim=1, stable=True))
    nothing = torch.empty(*q.shape[:2], 0)
    out, lse = _attend(q, k, v, chosen.contiguous(), 0, counts, chosen.shape[1], nothing)
    return out, lse * _LN2


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: torch.Tensor,
    start: int,
    ends: torch.Tensor,
    length: int,
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_loops.attend` of up to ``length`` tokens, and its parts merged; ``lse`` in units of log 2."""
    sets, heads, channels = q.shape
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    stretch = -(-length // parts(-(-length // _PART)))
    count = -(-length // stretch)
    grouped = torch.zeros(sets, -(-heads // _loops.GROUPED) * _loops.GROUPED, channels)
    grouped[:, :heads] = q.detach() / _LN2
    outs = np.empty((sets * count, heads, channels), np.float32)
    lses = np.empty((sets * count, heads), np.float32)
    _loops.attend(
        grouped.numpy(), heads, _flat(k), _flat(v), *k.stride()[:2], *v.stride()[:2],
        sets // len(k), tokens.numpy(), start, ends.numpy(), count, stretch, logits.numpy(),
        outs, lses,
    )  # fmt: skip
    out = torch.from_numpy(outs).view(sets, count, heads, channels)
    lse = torch.from_numpy(lses).view(sets, count, heads)
    if count == 1:
        return out[:, 0], lse[:, 0]
    highest = lse.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (lse - highest).exp2()
    total = weights.sum(1)
    merged = (out * weights[..., None]).sum(1) / total.clamp(min=1.0)[..., None]
    return merged, highest.squeeze(1) + total.log2()


def _flat(cache: torch.Tensor) -> np.ndarray:
    """The memory from a tensor's first element to its last; its channels follow one another."""
    extent = 1 + sum(
        (n - 1) * stride for n, stride in zip(cache.shape, cache.stride(), strict=True)
    )
    return cache.detach().as_strided((extent,), (1,)).numpy()
