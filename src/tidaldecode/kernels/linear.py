"""linear: a few rows times the weights that share them, with what comes before and after in a decoder.

Reading the weights is nearly all that such a product costs; what else touches the rows is free inside,
and costs a launch outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidaldecode.errors import TidalError, check_tensor
from tidaldecode.kernels.contract import FLOAT_DTYPES
from tidaldecode.kernels.dispatch import resolve_backend
from tidaldecode.kernels.rms_norm import normalise

MAX_ROWS = 64
"""Rows up to which reading the weights is nearly all that a product costs."""
MAX_WEIGHTS = 3
"""Weights of one launch: query, key and value."""


def linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``x [B, K]`` times the transpose of each weight ``[N_i, K]``, side by side: ``[B, sum(N_i)]``.

    Accumulation is fp32. In Triton what comes before and after the product is not rounded in between;
    for one row the first weights are read before the kernel that makes ``x`` has ended.

    Args:
        weights: one to three, contiguous, of x's dtype; ``x`` has up to 64 rows.
        gain: ``[K]``: RMS-normalise ``x`` with ``eps`` and this gain first (arXiv 1910.07467). One row
            only: several would be normalised by every program anew.
        gated: two weights of one size, gate and up: return ``silu(gate) * up [B, N]``
            (arXiv 2002.05202).
        residual: ``[B, sum(N_i)]``, or ``[B, N]`` where gated: added to the result.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    check_tensor("x", x, (None, None), dtypes=FLOAT_DTYPES, device=x.device)
    outputs = _check(x, weights, gated)
    for name, extra, shape in (
        ("gain", gain, (x.shape[1],)),
        ("residual", residual, (x.shape[0], outputs)),
    ):
        if extra is not None:
            check_tensor(name, extra, shape, dtypes=(x.dtype,), device=x.device)
    if gain is not None and x.shape[0] > 1:
        raise TidalError(f"gain: expected one row to normalise, got {x.shape[0]}")
    if resolve_backend(backend, x.device, dtype=x.dtype) == "triton":
        from tidaldecode.kernels.triton import linear as twin

        return twin.linear(x, weights, gain, eps, gated, residual, outputs)
    if gain is not None:
        x = normalise(x, gain, eps)
    products = [torch.nn.functional.linear(x, weight) for weight in weights]
    if gated:
        products = [torch.nn.functional.silu(products[0]) * products[1]]
    out = torch.cat(products, 1)
    return out if residual is None else residual + out


def _check(x: torch.Tensor, weights: Sequence[torch.Tensor], gated: bool) -> int:
    """Columns of the result. Errors: `TidalError`."""
    batch, inputs = x.shape
    if not 1 <= len(weights) <= MAX_WEIGHTS or batch > MAX_ROWS:
        raise TidalError(
            f"linear: expected 1 to {MAX_WEIGHTS} weights and up to {MAX_ROWS} rows, got "
            f"{len(weights)} and {batch}"
        )
    for weight in weights:
        check_tensor("weight", weight, (None, inputs), dtypes=(x.dtype,), device=x.device)
        if not weight.is_contiguous():
            raise TidalError(f"weight: expected it contiguous, got strides {weight.stride()}")
    sizes = [weight.shape[0] for weight in weights]
    if not gated:
        return sum(sizes)
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise TidalError(f"gated: expected two weights of one size, got sizes {sizes}")
    return sizes[0]
