"""append_token: write every row's newest key and value to where its sequence ends."""

from __future__ import annotations

import torch

from tidaldecode.errors import check_tensor
from tidaldecode.kernels.contract import FLOAT_DTYPES, check_rows
from tidaldecode.kernels.dispatch import resolve_backend


def append_token(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write ``k, v [B, Hkv, D]`` into strided caches ``[B, Hkv, S_max, D]`` at ``seq_lens - 1``.

    ``seq_lens [B]`` int32 counts the new token already; 1 to S_max (in Triton others write nothing).

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    check_tensor("k", k, (None, None, None), dtypes=FLOAT_DTYPES, device=k.device)
    batch, heads, head_dim = k.shape
    check_tensor("v", v, tuple(k.shape), dtypes=(k.dtype,), device=k.device)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        shape = (batch, heads, None, head_dim)
        check_tensor(name, cache, shape, dtypes=(k.dtype,), device=k.device)
    check_rows(seq_lens, None, batch, k.device)
    if resolve_backend(backend, k.device, head_dim=head_dim) == "triton":
        from tidaldecode.kernels.triton import append_token as twin

        twin.append_token(k_cache, v_cache, k, v, seq_lens)
        return
    rows = torch.arange(batch, device=k.device)
    last = seq_lens.long() - 1
    k_cache[rows, :, last] = k
    v_cache[rows, :, last] = v
