"""TidalDecode on top of a dense attention backend of vLLM: put these before its classes.

The dense backend writes the KV cache, runs prefill and the dense layers; the decode rows of the other
layers are ours. It must keep keys and values packed as FlashAttention does from vLLM 0.26 on: logical
``[num_blocks, Hkv, block_size, 2 D]``.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

from tidaldecode.errors import TidalError
from tidaldecode.integrations.vllm import memory
from tidaldecode.integrations.vllm.group import OURS, plan_group, work_memory
from tidaldecode.integrations.vllm.options import read_options
from tidaldecode.integrations.vllm.step import DecodeStep, count_decode_rows
from tidaldecode.integrations.vllm.support import KV_DTYPES, check_engine, check_layer


class TidalBackendMixin:
    """What the backend says of itself; the name is the slot that vLLM keeps for plugins."""

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's registry."""
        return "CUSTOM"

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Only the model's own dtype."""
        return kv_cache_dtype in KV_DTYPES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Only decoders."""
        return str(getattr(attn_type, "value", attn_type)) == "decoder"

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks are not in the kernels."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Bidirectional prefixes are not in the kernels."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Only causal attention."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Nobody has proved it."""
        return False


class TidalBuilderMixin:
    """Plans the layers of its group, and makes a `DecodeStep` for every batch, as ``metadata.tidal``."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold = 1
    # It would put another group's block table beside our step, which has its own.
    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs of uniform batches only: the Python of a mixed batch splits it anew every step."""
        return AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        memory.release()
        self._maker = plan_group(kv_cache_spec, layer_names, vllm_config, device)
        self._captured = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The dense backend's metadata, with our step beside it."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.tidal = self._step(common_attn_metadata)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """The same for a graph, whose step must serve batches of any length."""
        self._captured = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._captured = False

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: it splits the context of a batch in two."""
        return False

    def _step(self, common: Any) -> DecodeStep | None:
        """The step of this batch, or None if it is the dense backend's altogether."""
        maker = self._maker
        if maker is None:
            return None
        rows = count_decode_rows(common.query_start_loc_cpu, common.max_query_len)
        if rows == 0 and maker.is_warm:
            return None
        step = maker.make(rows, common.seq_lens, common.block_table_tensor, common.is_prefilling)
        if rows == 0 or (not self._captured and maker.is_dense(common.max_seq_len)):
            step.dense = True
            return None if maker.is_warm else step
        if rows < common.num_reqs:
            after = UBatchSlice(slice(rows, common.num_reqs), slice(rows, common.num_actual_tokens))
            (rest,) = split_attn_metadata([after], common)
            # fast_build: FlashAttention's schedule lives in one buffer, which the whole batch has.
            step.rest = super().build(0, rest, fast_build=True)  # type: ignore[misc]
        return step


class TidalImplMixin:
    """One layer: our rows of SELECT and SPARSE layers are ours, everything else the dense backend's."""

    supports_dcp = False
    supports_pcp = False
    layer_index: int | None = None
    """Set by the builder that plans this layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        check_layer(
            alibi_slopes=alibi_slopes,
            kv_cache_dtype=kv_cache_dtype,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            sinks=extra.get("sinks"),
        )
        # Here, and not where they are used: no weights have been loaded yet.
        engine = get_current_vllm_config()
        check_engine(engine)
        read_options(engine.additional_config)
        self._engine = engine
        super().__init__(  # type: ignore[call-arg]
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer for a whole batch, into ``output``.

        ``query, output [tokens, Hq, D]``; ``key, value [tokens, Hkv, D]``, in the cache already.

        Errors: `TidalError` for an output that should be quantised.
        """
        if attn_metadata is None and kv_cache.numel() == 0:
            # vLLM measures how much memory is left for the cache, and has no builder yet.
            memory.claim(query.device, work_memory(self._engine).claimed)
        step: DecodeStep | None = getattr(attn_metadata, "tidal", None)
        index = self.layer_index
        if step is not None:
            keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
            step.maker.warm_up(query, keys, values, step, self.scale)  # type: ignore[attr-defined]
        if step is None or step.dense or index is None or step.maker.plan[index] not in OURS:
            return super().forward(  # type: ignore[misc,no-any-return]
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if output_scale is not None or output_block_scale is not None:
            raise TidalError("output_scale: expected None, got a scale; disable fused quantisation")
        rows = step.rows
        out = output.view_as(query)[:rows]
        step.attend(query[:rows], keys, values, index, scale=self.scale, out=out)  # type: ignore[attr-defined]
        if step.rest is not None:
            super().forward(  # type: ignore[misc]
                layer,
                query[rows:],
                key[rows:],
                value[rows:],
                kv_cache,
                step.rest,
                output[rows:],
            )
        return output
