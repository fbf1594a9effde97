"""Attention kernels of other libraries, on the same keys and values in pages of 16 tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

PAGE = 16
_WORKSPACE_BYTES = 128 << 20


def paged(cache: torch.Tensor) -> torch.Tensor:
    """Copy a cache ``[B, Hkv, S, D]`` to pages ``[B * pages, 16, Hkv, D]``, row after row."""
    _, heads, tokens, head_dim = cache.shape
    filled = torch.nn.functional.pad(cache, (0, 0, 0, -tokens % PAGE))
    return filled.transpose(1, 2).reshape(-1, PAGE, heads, head_dim)


def peers(
    q: torch.Tensor, caches: list[tuple[torch.Tensor, torch.Tensor]], scale: float
) -> dict[str, Callable[[int], torch.Tensor]]:
    """What is installed here, by its name in tables: attention of ``q [B, Hq, D]`` to layer ``i``.

    Every layer's K and V ``[B, Hkv, S, D]`` are copied. Nothing on a CPU.
    """
    makers = {"FlashInfer": ("flashinfer", _flashinfer), "FlashAttention 3": ("vllm", _vllm_flash)}
    present = {
        name: make
        for name, (module, make) in makers.items()
        if q.is_cuda and importlib.util.find_spec(module)
    }
    if not present:
        return {}
    tokens = caches[0][0].shape[2]
    copies = [(paged(k), paged(v)) for k, v in caches]
    return {name: make(q, copies, tokens, scale) for name, make in present.items()}


def _flashinfer(
    q: torch.Tensor, copies: list[tuple[torch.Tensor, torch.Tensor]], tokens: int, scale: float
) -> Callable[[int], torch.Tensor]:
    """FlashInfer's paged decode, planned once for all layers."""
    import flashinfer

    batch, query_heads, head_dim = q.shape
    kv_heads = copies[0][0].shape[2]
    pages = -(-tokens // PAGE)
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    # Left to itself it takes "fa3" on Hopper, which does not split a row: 12 times slower for one.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=query_heads // kv_heads >= 4, backend="fa2"
    )
    counts = torch.full((batch,), (tokens - 1) % PAGE + 1, dtype=torch.int32, device=q.device)
    wrapper.plan(
        torch.arange(0, (batch + 1) * pages, pages, dtype=torch.int32, device=q.device),
        torch.arange(batch * pages, dtype=torch.int32, device=q.device),
        counts,
        query_heads,
        kv_heads,
        head_dim,
        PAGE,
        q_data_type=q.dtype,
        sm_scale=scale,
    )
    return lambda layer: wrapper.run(q, copies[layer])


def _vllm_flash(
    q: torch.Tensor, copies: list[tuple[torch.Tensor, torch.Tensor]], tokens: int, scale: float
) -> Callable[[int], torch.Tensor]:
    """FlashAttention 3 as vLLM ships it."""
    # vLLM turns cuDNN's attention off, which torch SDPA would take, and is timed beside it.
    allowed = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    torch.backends.cuda.enable_cudnn_sdp(allowed)

    batch = len(q)
    pages = -(-tokens // PAGE)
    options: dict[str, Any] = {
        "max_seqlen_q": 1,
        "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device=q.device),
        "max_seqlen_k": tokens,
        "seqused_k": torch.full((batch,), tokens, dtype=torch.int32, device=q.device),
        "block_table": torch.arange(batch * pages, dtype=torch.int32, device=q.device).view(
            batch, pages
        ),
        "softmax_scale": scale,
        "causal": True,
        "fa_version": 3,
    }

    def attend(layer: int) -> torch.Tensor:
        out: torch.Tensor = flash_attn_varlen_func(q, *copies[layer], **options)
        return out

    return attend
