"""append_token: write every row's newest keys and values to where its sequence ends."""

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

    Or ``[B, T, Hkv, D]``, several tokens of each row, at ``seq_lens - T`` and after. ``seq_lens [B]``
    int32 counts the new tokens already, and neither T nor any of them is more than S_max. A token whose
    place lies before the first is not written (in Triton one behind the last is not either).

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    dims, (batch, heads, head_dim) = check_new_tokens(k_cache, v_cache, k, v, seq_lens)
    if resolve_backend(backend, k.device, head_dim=head_dim) == "triton":
        from tidaldecode.kernels.triton import append_token as twin

        twin.append_token(k_cache, v_cache, k, v, seq_lens)
        return
    count = 1 if dims == 3 else k.shape[1]
    rows = torch.arange(batch, device=k.device)[:, None]
    places = seq_lens.long()[:, None] - count + torch.arange(count, device=k.device)
    inside = (places >= 0)[..., None, None]
    for cache, new in ((k_cache, k), (v_cache, v)):
        new = new.reshape(batch, count, heads, head_dim)
        # A place before the first is one from the end, which keeps what it holds.
        cache[rows, :, places] = torch.where(inside, new, cache[rows, :, places])


def check_new_tokens(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
) -> tuple[int, tuple[int, int, int]]:
    """Check new keys and values and where they go; dimensions of ``k``, and ``(B, Hkv, D)``.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    dims = 4 if getattr(k, "ndim", 3) == 4 else 3
    check_tensor("k", k, (None,) * dims, dtypes=FLOAT_DTYPES, device=k.device)
    batch, heads, head_dim = len(k), k.shape[-2], k.shape[-1]
    check_tensor("v", v, tuple(k.shape), dtypes=(k.dtype,), device=k.device)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        shape = (batch, heads, None, head_dim)
        check_tensor(name, cache, shape, dtypes=(k.dtype,), device=k.device)
    check_rows(seq_lens, None, batch, k.device)
    return dims, (batch, heads, head_dim)
