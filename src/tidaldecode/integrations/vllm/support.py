"""Which versions, engines and layers of vLLM are refused, and why. Imports no vLLM."""

from __future__ import annotations

import re
from typing import Any

import torch

from tidaldecode.errors import TidalError
from tidaldecode.kernels.dispatch import resolve_backend

OLDEST, NEWEST = (0, 26), (0, 33)
KV_DTYPES = (None, "auto", "float16", "bfloat16", "float32")


def check_version(version: str) -> None:
    """Refuse a vLLM whose internals nobody has tried. Errors: `TidalError` naming the version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        raise TidalError(
            f"vllm: expected a version from {_dotted(OLDEST)}.0 to {_dotted(NEWEST)}.x, got {version}; "
            f"pip install 'vllm>={_dotted(OLDEST)},<{NEWEST[0]}.{NEWEST[1] + 1}', or choose another "
            "attention backend"
        )


def check_engine(config: Any) -> None:
    """Refuse what a sparse decode step would get wrong; ``config`` is a ``VllmConfig``.

    Errors: `TidalError` naming the setting.
    """
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    text = model.hf_text_config
    softcap = getattr(text, "attn_logit_softcapping", None)
    obstacles = (
        (
            getattr(model, "use_mla", False),
            "keys and values of one head size",
            "a model with multi-head latent attention (MLA), which the kernels do not have",
        ),
        (
            softcap is not None,
            "plain softmax attention",
            f"a model with attention soft-capping ({softcap}), which the kernels do not have",
        ),
        (
            cache.cache_dtype not in KV_DTYPES,
            "a KV cache in the model's dtype",
            f"--kv-cache-dtype {cache.cache_dtype}; leave it at auto",
        ),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1,
            "the whole context of a sequence on one rank",
            "--decode-context-parallel-size above 1: a rank would select among its own tokens only",
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "the whole context of a sequence on one rank",
            "--prefill-context-parallel-size above 1",
        ),
        (
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False),
            "one batch at a time",
            "dual batch overlap (--enable-dbo), where two half batches would share a selection",
        ),
        (
            config.speculative_config is not None,
            "no speculative decoding",
            "--speculative-config: drafts would be accepted by dense and decoded by sparse attention "
            "in turn, which nobody has proved",
        ),
    )
    for found, expected, got in obstacles:
        if found:
            raise TidalError(f"vllm: expected {expected}, got {got}")


def check_backend(
    backend: str, device: torch.device, query_heads: int, kv_heads: int, config: Any
) -> None:
    """Refuse to capture the PyTorch kernels, which ask the device for lengths.

    Errors: `TidalError` for a model or setting that would run them within CUDA graphs.
    """
    if device.type != "cuda" or not config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return
    model = config.model_config
    head_dim, group = model.get_head_size(), query_heads // kv_heads
    found = resolve_backend(backend, device, dtype=model.dtype, head_dim=head_dim, group=group)
    if found == "torch":
        raise TidalError(
            f"backend: expected the Triton kernels for CUDA graphs, got those of PyTorch (backend "
            f"{backend!r}, head dimension {head_dim}, {group} query heads per KV head); "
            "use --enforce-eager"
        )


def check_layer(
    *,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    sinks: Any,
) -> None:
    """Refuse a layer whose attention the kernels would get wrong.

    Errors: `TidalError` naming the property.
    """
    obstacles = (
        (alibi_slopes is not None, "ALiBi slopes"),
        (kv_cache_dtype not in KV_DTYPES, f"a KV cache of {kv_cache_dtype}"),
        (bool(logits_soft_cap), f"soft-capped logits ({logits_soft_cap})"),
        (str(getattr(attn_type, "value", attn_type)) != "decoder", f"{attn_type} attention"),
        (kv_sharing_target_layer_name is not None, "keys and values of another layer"),
        (sinks is not None, "learned attention sinks"),
    )
    for found, got in obstacles:
        if found:
            raise TidalError(
                f"vllm: expected causal softmax attention over keys and values in the model's dtype, "
                f"got a layer with {got}, which the kernels do not have; choose another backend"
            )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
