"""Attention of one row in loops that Numba compiles: K and V are read once, at the speed of memory.

A processor's core asks for a page of memory only when it is there, so one that reads a single stream
waits at the end of every page. These loops read two streams of keys and four of values at a time.

K and V are flat arrays, in which a token's ``D`` channels follow one another. Logits are in units of
log 2, log-sum-exps are not. Parts of a head's tokens are attended to on their own:
``part_out [H * parts, G, D]`` and ``part_lse [H * parts, G]``.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

BLOCK = 256
"""Tokens at a time: their logits, and the keys of several heads' groups, stay in the core's cache."""
_GROUPED = 4
"""Query heads that share a pass over the keys; there are always a multiple of it, some of them zero."""
_LOG2E, _LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_LANES = 16
"""Logits that are compared at a time."""
_LOWEST = np.float32(-3.0e38)


def _cacheable() -> bool:
    """Whether there is a folder for compiled loops: they would otherwise be refused."""
    try:
        njit(cache=True)(_cacheable)
    except RuntimeError:
        return False
    return True


_OPTIONS = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},  # sums in any order; NaN stays what it is
    "error_model": "numpy",
    "cache": _cacheable(),
}


@njit(**_OPTIONS)
def _exp2(logits, shift, count, powers, bits, scales):
    """``powers[:count] = 2 ** (logits[:count] - shift)``, of nothing above 0; below -126 as of -126.

    ``bits`` and ``scales`` are the same memory as int32 and float32. Taylor's series of ``2 ** f``
    is exact to fp32's rounding for ``f`` between -0.5 and 0.5.
    """
    for t in range(count):
        x = logits[t] - shift
        x = np.float32(-126.0) if x < np.float32(-126.0) else x
        whole = np.floor(x + np.float32(0.5))
        f = x - whole
        bits[t] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        p = np.float32(1.5252734e-5)
        p = p * f + np.float32(1.5403530e-4)
        p = p * f + np.float32(1.3333558e-3)
        p = p * f + np.float32(9.6181291e-3)
        p = p * f + np.float32(5.5504109e-2)
        p = p * f + np.float32(2.4022651e-1)
        p = p * f + np.float32(6.9314718e-1)
        powers[t] = p * f + np.float32(1.0)
    for t in range(count):
        powers[t] *= scales[t]


@njit(**_OPTIONS)
def _multiply_keys(q, k, k_at, count, logits):
    """``logits[:, :count]`` of the keys from ``k_at [count]`` on, for ``q [G', D]``."""
    heads, channels = q.shape
    half = count // 2
    for g in range(0, heads, 4):
        q0, q1, q2, q3 = q[g], q[g + 1], q[g + 2], q[g + 3]
        for t in range(half):
            x = k[k_at[t] : k_at[t] + channels]
            y = k[k_at[half + t] : k_at[half + t] + channels]
            a0 = a1 = a2 = a3 = np.float32(0)
            b0 = b1 = b2 = b3 = np.float32(0)
            for d in range(channels):
                a0 += x[d] * q0[d]
                a1 += x[d] * q1[d]
                a2 += x[d] * q2[d]
                a3 += x[d] * q3[d]
                b0 += y[d] * q0[d]
                b1 += y[d] * q1[d]
                b2 += y[d] * q2[d]
                b3 += y[d] * q3[d]
            logits[g, t], logits[g, half + t] = a0, b0
            logits[g + 1, t], logits[g + 1, half + t] = a1, b1
            logits[g + 2, t], logits[g + 2, half + t] = a2, b2
            logits[g + 3, t], logits[g + 3, half + t] = a3, b3
        for t in range(2 * half, count):
            x = k[k_at[t] : k_at[t] + channels]
            for i in range(4):
                total = np.float32(0)
                for d in range(channels):
                    total += x[d] * q[g + i, d]
                logits[g + i, t] = total


@njit(**_OPTIONS)
def _add_values(weights, v, v_at, count, acc):
    """``acc [G, D]`` plus the values from ``v_at [count]`` on, times ``weights[:G, :count]``."""
    heads, channels = acc.shape
    quarter = count // 4
    for t in range(quarter):
        a = v[v_at[t] : v_at[t] + channels]
        b = v[v_at[quarter + t] : v_at[quarter + t] + channels]
        c = v[v_at[2 * quarter + t] : v_at[2 * quarter + t] + channels]
        e = v[v_at[3 * quarter + t] : v_at[3 * quarter + t] + channels]
        for g in range(heads):
            row = acc[g]
            wa, wb = weights[g, t], weights[g, quarter + t]
            wc, we = weights[g, 2 * quarter + t], weights[g, 3 * quarter + t]
            for d in range(channels):
                row[d] += (wa * a[d] + wb * b[d]) + (wc * c[d] + we * e[d])
    for t in range(4 * quarter, count):
        a = v[v_at[t] : v_at[t] + channels]
        for g in range(heads):
            for d in range(channels):
                acc[g, d] += weights[g, t] * a[d]


@njit(**_OPTIONS)
def _largest(logits, count, largest):
    """The largest of ``logits[:count]`` and ``largest``."""
    lanes = np.full(_LANES, largest, np.float32)
    for first in range(0, count, _LANES):
        for lane in range(_LANES):
            x = logits[first + lane]
            lanes[lane] = x if x > lanes[lane] else lanes[lane]
    for lane in range(_LANES):
        largest = lanes[lane] if lanes[lane] > largest else largest
    return largest


@njit(**_OPTIONS)
def _attend(q, heads, k, v, k_at, v_at, count, logits, powers, bits, scales, peak, total, acc):
    """Take ``count`` tokens in: ``peak [G]``, ``total [G]`` and ``acc [G, D]`` after them."""
    _multiply_keys(q, k, k_at, count, logits)
    for g in range(heads):
        padded = -(-count // _LANES) * _LANES
        logits[g, count:padded] = _LOWEST
        highest = _largest(logits[g], padded, peak[g])
        _exp2(logits[g], highest, count, powers[g], bits, scales)
        old = np.float32(2.0) ** (peak[g] - highest)
        added = np.float32(0)
        for t in range(count):
            added += powers[g, t]
        peak[g] = highest
        total[g] = total[g] * old + added
        for d in range(acc.shape[1]):
            acc[g, d] *= old
    _add_values(powers, v, v_at, count, acc)


@njit(**_OPTIONS)
def _copy(cache, at, count, channels, near):
    """The channels of ``count`` tokens side by side: alone, a core asks for many of them at a time."""
    for t in range(count):
        token = cache[at[t] : at[t] + channels]
        place = near[t * channels : (t + 1) * channels]
        for d in range(channels):
            place[d] = token[d]


@njit(parallel=True, **_OPTIONS)
def attend(
    q, k, v, k_head, k_token, v_head, v_token, sharers,
    tokens, start, ends, parts, length, kept, part_out, part_lse,
):  # fmt: skip
    """Attention of ``q [H, G, D]``, scaled.

    To the tokens from ``start`` on, up to ``ends [1 or H]``, or, if ``tokens [1 or H, N]`` has columns,
    to those in these columns; ``length`` of them a part. ``sharers`` of H have one KV head. Logits go
    to ``kept [H, G, N]`` if it has columns. A part without tokens has the output 0 and -inf.
    """
    sets, heads, channels = q.shape
    grouped = -(-heads // _GROUPED) * _GROUPED
    for item in prange(sets * parts):
        head, part = item // parts, item % parts
        queries = np.zeros((grouped, channels), np.float32)
        for g in range(heads):
            for d in range(channels):
                queries[g, d] = q[head, g, d] * _LOG2E
        logits = np.empty((grouped, BLOCK), np.float32)
        powers = np.empty((heads, BLOCK), np.float32)
        bits = np.empty(BLOCK, np.int32)
        scales = bits.view(np.float32)
        k_at = np.empty(BLOCK, np.int64)
        v_at = np.empty(BLOCK, np.int64)
        peak = np.full(heads, _LOWEST, np.float32)
        total = np.zeros(heads, np.float32)
        acc = np.zeros((heads, channels), np.float32)
        k_from, v_from = head // sharers * k_head, head // sharers * v_head
        scattered = tokens.shape[1] > 0
        near = np.arange(BLOCK) * channels
        near_k = np.empty(BLOCK * channels if scattered else 0, np.float32)
        near_v = np.empty(BLOCK * channels if scattered else 0, np.float32)
        lowest = start + part * length
        highest = min(lowest + length, ends[head % len(ends)])
        for first in range(lowest, highest, BLOCK):
            count = min(BLOCK, highest - first)
            for t in range(count):
                token = tokens[head % len(tokens), first + t] if scattered else first + t
                k_at[t] = k_from + token * k_token
                v_at[t] = v_from + token * v_token
            if scattered:
                _copy(k, k_at, count, channels, near_k)
                _copy(v, v_at, count, channels, near_v)
                _attend(
                    queries, heads, near_k, near_v, near, near, count,
                    logits, powers, bits, scales, peak, total, acc,
                )  # fmt: skip
            else:
                _attend(
                    queries, heads, k, v, k_at, v_at, count,
                    logits, powers, bits, scales, peak, total, acc,
                )  # fmt: skip
            if kept.shape[2] > 0:
                kept[head, :, first - start : first - start + count] = logits[:heads, :count]
        for g in range(heads):
            found = np.float32(1) if total[g] == 0 else total[g]
            for d in range(channels):
                part_out[item, g, d] = acc[g, d] / found
            part_lse[item, g] = -np.inf if total[g] == 0 else peak[g] * _LN2 + np.log(found)


@njit(parallel=True, **_OPTIONS)
def sum_weights(kept, lse, scores):
    """``scores [R, N]``: what logits ``kept [Hq, N]`` weigh by ``lse [Hq]``, summed over each set."""
    sets, width = scores.shape
    heads = len(kept) // sets
    blocks = -(-width // BLOCK)
    for item in prange(sets * blocks):
        chosen, first = item // blocks, item % blocks * BLOCK
        count = min(BLOCK, width - first)
        powers = np.empty(BLOCK, np.float32)
        bits = np.empty(BLOCK, np.int32)
        scales = bits.view(np.float32)
        found = np.zeros(BLOCK, np.float32)
        for head in range(chosen * heads, (chosen + 1) * heads):
            logits = kept[head, first : first + count]
            _exp2(logits, lse[head] * _LOG2E, count, powers, bits, scales)
            for t in range(count):
                found[t] += powers[t]
        scores[chosen, first : first + count] = found[:count]
