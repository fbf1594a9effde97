"""rotate_append: rotary embedding of the newest queries and keys; keys and values go to the cache."""

from __future__ import annotations

import torch

from tidaldecode.errors import TidalError, check_tensor
from tidaldecode.kernels.append_token import append_token, check_new_tokens
from tidaldecode.kernels.dispatch import resolve_backend
from tidaldecode.kernels.rms_norm import normalise


def rotate_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    q_gain: torch.Tensor | None = None,
    k_gain: torch.Tensor | None = None,
    eps: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotate ``q [B, Hq, D]`` and ``k [B, Hkv, D]``, append ``k`` and ``v``; returns the rotated ``q``.

    Rotary embedding (arXiv 2104.09864), channel ``i`` with ``i + D / 2``, as transformers computes it:
    ``x * cos + (-x[D/2:], x[:D/2]) * sin``, both products and the sum rounded to the dtype of ``q``.

    Args:
        k_cache, v_cache, v, seq_lens: as in `append_token`. With ``T`` tokens of each row, ``q``, ``k``
            and ``v`` are ``[B, T, heads, D]``.
        cos, sin: ``[B, D]`` or ``[B, T, D]``, for all heads.
        q_gain, k_gain: ``[D]``, both or neither: `rms_norm` every head with ``eps`` first. In Triton
            they are read before the kernel that makes ``q`` has ended.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    _, (batch, _, head_dim) = check_new_tokens(k_cache, v_cache, k, v, seq_lens)
    tokens = tuple(k.shape[1:-2])
    for name, states, heads in (("q", q, (None,)), ("cos", cos, ()), ("sin", sin, ())):
        shape = (batch, *tokens, *heads, head_dim)
        check_tensor(name, states, shape, dtypes=(k.dtype,), device=k.device)
    if head_dim % 2:
        raise TidalError(f"q: expected an even head dimension, got {head_dim}")
    if (q_gain is None) != (k_gain is None):
        raise TidalError("q_gain, k_gain: expected both or neither, got one")
    for name, gain in (("q_gain", q_gain), ("k_gain", k_gain)):
        if gain is not None:
            check_tensor(name, gain, (head_dim,), dtypes=(k.dtype,), device=k.device)
    if resolve_backend(backend, k.device, dtype=k.dtype, head_dim=head_dim) == "triton":
        from tidaldecode.kernels.triton import rotate_append as twin

        return twin.rotate_append(
            k_cache, v_cache, q, k, v, cos, sin, seq_lens, q_gain, k_gain, eps
        )
    if q_gain is not None and k_gain is not None:
        q, k = normalise(q, q_gain, eps), normalise(k, k_gain, eps)
    append_token(k_cache, v_cache, _rotated(k, cos, sin), v, seq_lens, backend=backend)
    return _rotated(q, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[..., None, :] + torch.cat((-second, first), -1) * sin[..., None, :]
