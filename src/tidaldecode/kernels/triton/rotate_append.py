"""rotate_append in Triton: one launch between the products of a layer and its attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.triton._device import heads_at_once
from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor
from tidaldecode.kernels.triton.rms_norm import inverse_rms, scaled

_HELD = 512
"""Numbers of a head, or of several, that a program holds: 16 a thread."""


@triton.jit
def _rotate_append_kernel(
    k_cache, v_cache, q, k, v, cos, sin, q_gain, k_gain, seq_lens, out, eps, capacity,
    kc_row, kc_head, kc_token, kc_channel,
    vc_row, vc_head, vc_token, vc_channel,
    q_row, q_new, q_head, q_channel,
    k_row, k_new, k_head, k_channel,
    v_row, v_new, v_head, v_channel,
    cos_row, cos_new, cos_channel,
    sin_row, sin_new, sin_channel,
    out_row, out_new,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(Hq / HEADS) + ceil(Hkv / HEADS), B, T)``: a program has heads of q, or of k and v."""
    part, row, new = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    query_parts: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    channel = tl.arange(0, DP)
    cos += row * cos_row + new * cos_new
    sin += row * sin_row + new * sin_new
    if part < query_parts:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < QUERY_HEADS) & (channel < D)[None, :]
        source = q + row * q_row + new * q_new + head * q_head
        turned = _rotated(
            source, inside, q_channel, cos, cos_channel, sin, sin_channel, q_gain, eps,
            D, DP, NORM, OVERLAP,
        )  # fmt: skip
        target = out + row * out_row + new * out_new + head * D
        tl.store(target + channel[None, :], turned, mask=inside)
    else:
        head = (part - query_parts) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < KV_HEADS) & (channel < D)[None, :]
        source = k + row * k_row + new * k_new + head * k_head
        turned = _rotated(
            source, inside, k_channel, cos, cos_channel, sin, sin_channel, k_gain, eps,
            D, DP, NORM, OVERLAP,
        )  # fmt: skip
        place = tl.load(seq_lens + row).to(tl.int64) - tl.num_programs(2) + new
        fits = (place >= 0) & (place < capacity)
        inside = inside & (channel < tl.where(fits, D, 0))[None, :]
        value_source = v + row * v_row + new * v_new + head * v_head
        value = tl.load(value_source + channel[None, :] * v_channel, mask=inside)
        k_target = k_cache + row * kc_row + head.to(tl.int64) * kc_head + place * kc_token
        v_target = v_cache + row * vc_row + head.to(tl.int64) * vc_head + place * vc_token
        tl.store(k_target + channel[None, :] * kc_channel, turned, mask=inside)
        tl.store(v_target + channel[None, :] * vc_channel, value, mask=inside)


@triton.jit
def _rotated(
    x, inside, x_channel, cos, cos_channel, sin, sin_channel, gain, eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Heads ``[HEADS, DP]`` at ``x [HEADS, 1]``, each product and the sum rounded."""
    channel = tl.arange(0, DP)
    real = channel < D
    lower = channel < D // 2
    partner = tl.where(lower, channel + D // 2, channel - D // 2)
    if NORM:
        # No kernel writes weights: gains may be read before the predecessor has ended.
        gains = tl.load(gain + channel, mask=real, other=0.0)[None, :]
        partner_gains = tl.load(gain + partner, mask=real, other=0.0)[None, :]
    wait_for_predecessor(OVERLAP)
    value = tl.load(x + channel[None, :] * x_channel, mask=inside, other=0.0)
    other = tl.load(x + partner[None, :] * x_channel, mask=inside, other=0.0)
    cosine = tl.load(cos + channel * cos_channel, mask=real, other=0.0).to(tl.float32)
    sine = tl.load(sin + channel * sin_channel, mask=real, other=0.0).to(tl.float32)
    if NORM:
        inverse = inverse_rms(value, eps, D)
        value = scaled(value, inverse, gains)
        other = scaled(other, inverse, partner_gains)
    straight = (value.to(tl.float32) * cosine[None, :]).to(value.dtype)
    across = (other.to(tl.float32) * tl.where(lower, -sine, sine)[None, :]).to(value.dtype)
    return (straight.to(tl.float32) + across.to(tl.float32)).to(value.dtype)


def rotate_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seq_lens: torch.Tensor,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Twin of `tidaldecode.kernels.rotate_append`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.dim() == 3:
        q, k, v, cos, sin = (states[:, None] for states in (q, k, v, cos, sin))
    batch, count, query_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if batch * count * (query_heads + kv_heads) == 0:
        return out
    padded_dim = triton.next_power_of_2(head_dim)
    heads = heads_at_once(batch * count * (query_heads + kv_heads), padded_dim, _HELD, q.device)
    parts = triton.cdiv(query_heads, heads) + triton.cdiv(kv_heads, heads)
    _rotate_append_kernel[(parts, batch, count)](
        k_cache, v_cache, q, k, v, cos, sin,
        q if q_gain is None else q_gain.contiguous(),
        k if k_gain is None else k_gain.contiguous(),
        seq_lens, out, eps, k_cache.shape[2],
        *k_cache.stride(),
        *v_cache.stride(),
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *cos.stride(),
        *sin.stride(),
        count * query_heads * head_dim, query_heads * head_dim,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        HEADS=heads,
        D=head_dim,
        DP=padded_dim,
        NORM=q_gain is not None,
        num_warps=1,
        # A product that is fused into the sum would not be rounded.
        enable_fp_fusion=False,
        **overlap(q.device),
    )  # fmt: skip
    return out
