"""linear: a few rows times several weights that share their input, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidaldecode.errors import TidalError, check_tensor
from tidaldecode.kernels.contract import FLOAT_DTYPES
from tidaldecode.kernels.dispatch import resolve_backend

MAX_ROWS = 64
"""Rows up to which reading the weights is nearly all that a product costs."""
MAX_WEIGHTS = 3
"""Weights of one launch: query, key and value."""


def linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], *, backend: str = "auto"
) -> torch.Tensor:
    """``x [B, K]`` times the transpose of each weight ``[N_i, K]``, side by side: ``[B, sum(N_i)]``.

    One to three contiguous weights of x's dtype, up to 64 rows; accumulation is fp32. In Triton the
    first bytes of the weights are read before the kernel that makes ``x`` has ended.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    check_tensor("x", x, (None, None), dtypes=FLOAT_DTYPES, device=x.device)
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
    if resolve_backend(backend, x.device, dtype=x.dtype) == "triton":
        from tidaldecode.kernels.triton import linear as twin

        return twin.linear(x, weights)
    return torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], 1)
