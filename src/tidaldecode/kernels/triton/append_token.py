"""append_token in Triton: keys and values of all rows and heads in one launch."""

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
    k_row, k_head, k_channel,
    v_row, v_head, v_channel,
    D: tl.constexpr,
    DP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(Hkv, B)``."""
    wait_for_predecessor(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    last = tl.load(seq_lens + row).to(tl.int64) - 1
    channel = tl.arange(0, DP)
    there = channel < tl.where((last >= 0) & (last < capacity), D, 0)
    key = tl.load(k + row * k_row + head * k_head + channel * k_channel, mask=there)
    value = tl.load(v + row * v_row + head * v_head + channel * v_channel, mask=there)
    k_target = k_cache + row * kc_row + head.to(tl.int64) * kc_head + last * kc_token
    v_target = v_cache + row * vc_row + head.to(tl.int64) * vc_head + last * vc_token
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
    batch, heads, head_dim = k.shape
    if batch == 0:
        return
    _append_kernel[(heads, batch)](
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
