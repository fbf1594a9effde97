"""rms_norm: every row over its root mean square, times a gain (arXiv 1910.07467)."""

from __future__ import annotations

import torch

from tidaldecode.errors import check_tensor
from tidaldecode.kernels.contract import FLOAT_DTYPES
from tidaldecode.kernels.dispatch import resolve_backend


def rms_norm(
    x: torch.Tensor, gain: torch.Tensor, *, eps: float, backend: str = "auto"
) -> torch.Tensor:
    """``x [B, K]`` over ``sqrt(mean(x^2) + eps)`` of its row, times ``gain [K]``: ``[B, K]``.

    Rounded as in transformers' LlamaRMSNorm: fp32 up to the quotient, which is rounded to x's dtype, as
    its product with the gain is. In Triton the gain is read before the kernel that makes ``x`` has
    ended: no kernel of the stream may be writing it.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    check_tensor("x", x, (None, None), dtypes=FLOAT_DTYPES, device=x.device)
    check_tensor("gain", gain, (x.shape[1],), dtypes=(x.dtype,), device=x.device)
    if resolve_backend(backend, x.device, dtype=x.dtype) == "triton":
        from tidaldecode.kernels.triton import rms_norm as twin

        return twin.rms_norm(x, gain, eps)
    return normalise(x, gain, eps)


def normalise(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm in PyTorch, of the last dimension of ``x [..., K]``."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return gain * wide.to(x.dtype)
