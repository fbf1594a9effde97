"""Dense paged attention in plain PyTorch, and TidalDecode on top of it: what FlashAttention is on a GPU.

The KV layout is FlashAttention's: logical ``[num_blocks, Hkv, block_size, 2 D]``, in memory
``[num_blocks, block_size, Hkv, 2 D]``, keys and values packed in the last dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

from tidaldecode.integrations.vllm.mixins import (
    TidalBackendMixin,
    TidalBuilderMixin,
    TidalImplMixin,
)


@dataclass
class DenseMetadata:
    query_start_loc: list[int]
    seq_lens: list[int]
    block_table: torch.Tensor


class DenseBuilder(AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> DenseMetadata:
        common = common_attn_metadata
        return DenseMetadata(
            common.query_start_loc.tolist(), common.seq_lens.tolist(), common.block_table_tensor
        )


class DenseImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any
    ) -> None:
        block_size = kv_cache.shape[2]
        slots = slot_mapping[slot_mapping >= 0]
        packed = torch.cat((key, value), dim=-1)[: len(slot_mapping)][slot_mapping >= 0]
        kv_cache[slots // block_size, :, slots % block_size] = packed

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DenseMetadata | None,
        output: torch.Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        starts = attn_metadata.query_start_loc
        for row, (start, end) in enumerate(pairwise(starts)):
            length = attn_metadata.seq_lens[row]
            if start == end or length == 0:
                continue
            blocks = attn_metadata.block_table[row, : -(-length // kv_cache.shape[2])].long()
            # [blocks, Hkv, block_size, 2 D] -> [Hkv, L, 2 D]
            cached = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            keys, values = cached.split(self.head_size, dim=-1)
            places = torch.arange(length - (end - start), length)[:, None]
            seen = torch.arange(length)[None]
            mask = seen <= places
            if self.window is not None:
                mask &= seen > places - self.window
            rows = torch.nn.functional.scaled_dot_product_attention(
                query[start:end].transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=True,
            )
            output[start:end] = rows[0].transpose(0, 1)
        return output


class DenseBackend(AttentionBackend):
    supported_dtypes: ClassVar = [torch.float32, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        return DenseImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return DenseBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return (1, 0, 3, 2, 4) if include_num_layers_dimension else (0, 2, 1, 3)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class TidalTorchBuilder(TidalBuilderMixin, DenseBuilder):
    pass


class TidalTorchImpl(TidalImplMixin, DenseImpl):
    pass


class TidalTorchBackend(TidalBackendMixin, DenseBackend):
    @staticmethod
    def get_impl_cls() -> Any:
        return TidalTorchImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return TidalTorchBuilder
