"""append_token in Triton: keys and values of all rows, heads and new tokens in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor


@triton.jit
def _append_kernel(
    k_cache, v_cache, k, v, seq_lens, capacity,
    kc_row, kc_head, kc_token, kc_channel,
    vc_row, vc_head, vc_token, vc_channel,
    k_row, k_new, k_head, k_channel,
    v_row, v_new, v_head, v_channel,
    D: tl.constexpr,
    DP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(Hkv, B, T)``."""
    wait_for_predecessor(OVERLAP)
    head, row, new = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    place = tl.load(seq_lens + row).to(tl.int64) - tl.num_programs(2) + new
    channel = tl.arange(0, DP)
    there = channel < tl.where((place >= 0) & (place < capacity), D, 0)
    k_source = k + row * k_row + new * k_new + head * k_head
    v_source = v + row * v_row + new * v_new + head * v_head
    key = tl.load(k_source + channel * k_channel, mask=there)
    value = tl.load(v_source + channel * v_channel, mask=there)
    k_target = k_cache + row * kc_row + head.to(tl.int64) * kc_head + place * kc_token
    v_target = v_cache + row * vc_row + head.to(tl.int64) * vc_head + place * vc_token
    tl.store(k_target + channel * kc_channel, key, mask=there)
    tl.store(v_target + channel * vc_channel, value, mask=there)


def append_token(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Twin of `tidaldecode.kernels.append_token`."""
    if k.dim() == 3:
        k, v = k[:, None], v[:, None]
    batch, count, heads, head_dim = k.shape
    if batch == 0 or count == 0:
        return
    _append_kernel[(heads, batch, count)](
        k_cache, v_cache, k, v, seq_lens, k_cache.shape[2],
        *k_cache.stride(),
        *v_cache.stride(),
        *k.stride(),
        *v.stride(),
        D=head_dim,
        DP=triton.next_power_of_2(head_dim),
        num_warps=1,
        **overlap(k.device),
    )  # fmt: skip
