"""rms_norm in Triton: one program holds one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidaldecode.kernels.triton._overlap import overlap, wait_for_predecessor


@triton.jit
def _rms_norm_kernel(
    x, gain, out, eps, x_row, x_channel,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid ``(B,)``."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    there = channel < INPUTS
    # No kernel writes weights: the gain may be read before the predecessor has ended.
    gains = tl.load(gain + channel, mask=there, other=0.0)
    wait_for_predecessor(OVERLAP)
    value = tl.load(x + row * x_row + channel * x_channel, mask=there, other=0.0)
    inverse = inverse_rms(value, eps, INPUTS)
    tl.store(out + row * INPUTS + channel, scaled(value, inverse, gains), mask=there)


@triton.jit
def inverse_rms(value, eps, INPUTS: tl.constexpr):
    """What rows ``[..., BLOCK]`` are multiplied by, fp32; channels beyond ``INPUTS`` hold zeros."""
    wide = value.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, -1, keep_dims=True) / INPUTS + eps)


@triton.jit
def scaled(value, inverse, gain):
    """``value * inverse``, rounded, times ``gain``, rounded: the order of roundings in PyTorch."""
    rounded = (value.to(tl.float32) * inverse).to(value.dtype)
    return (rounded.to(tl.float32) * gain.to(tl.float32)).to(value.dtype)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Twin of `tidaldecode.kernels.rms_norm`."""
    batch, inputs = x.shape
    out = torch.empty(batch, inputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(inputs)
    _rms_norm_kernel[(batch,)](
        x, gain.contiguous(), out, eps, *x.stride(),
        INPUTS=inputs,
        BLOCK=block,
        num_warps=_warps(block),
        **overlap(x.device),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """16 channels a thread, more only where a program would have over 16 warps."""
    return min(max(block // 512, 1), 16)
