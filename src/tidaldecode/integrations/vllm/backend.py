"""The backend that `register` names: TidalDecode on FlashAttention, for NVIDIA GPUs."""

from __future__ import annotations

import vllm

from tidaldecode.integrations.vllm.support import check_version

check_version(vllm.__version__)

from vllm.v1.attention.backends.flash_attn import (  # noqa: E402 (other versions fail here, unexplained)
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from tidaldecode.integrations.vllm.mixins import (  # noqa: E402
    TidalBackendMixin,
    TidalBuilderMixin,
    TidalImplMixin,
)


class TidalMetadataBuilder(TidalBuilderMixin, FlashAttentionMetadataBuilder):
    """FlashAttention's metadata, and the decode step beside it."""


class TidalImpl(TidalImplMixin, FlashAttentionImpl):
    """FlashAttention, and sparse attention for decode rows."""


class TidalBackend(TidalBackendMixin, FlashAttentionBackend):
    """Dense work at FlashAttention's speed; decode reads only what matters."""

    @staticmethod
    def get_impl_cls() -> type[TidalImpl]:
        """The layers' class."""
        return TidalImpl

    @staticmethod
    def get_builder_cls() -> type[TidalMetadataBuilder]:
        """The class that prepares a batch."""
        return TidalMetadataBuilder
