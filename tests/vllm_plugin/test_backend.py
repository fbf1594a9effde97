"""The backend for GPUs, as far as a CPU can tell: registered, and fitting the classes it stands on."""

import inspect

import pytest

pytest.importorskip("vllm.config", reason="make test-vllm installs vLLM")

import vllm
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tidaldecode.integrations.vllm import BACKEND, register
from tidaldecode.integrations.vllm.backend import TidalBackend, TidalImpl, TidalMetadataBuilder
from tidaldecode.integrations.vllm.support import check_version


def test_registering_twice_is_registering_once():
    register()
    register()
    assert AttentionBackendEnum.CUSTOM.get_path() == BACKEND
    assert AttentionBackendEnum.CUSTOM.get_class() is TidalBackend


def test_this_vllm_is_supported():
    check_version(vllm.__version__)


def test_it_says_what_it_can_do():
    assert TidalBackend.get_name() == "CUSTOM"
    assert not TidalBackend.forward_includes_kv_cache_update  # K/V are in the cache when we come
    assert not TidalBackend.is_sparse()  # vLLM's word for models with an indexer of their own
    assert not TidalBackend.supports_sink()
    assert not TidalBackend.supports_kv_cache_dtype("fp8")
    assert TidalBackend.supports_attn_type("decoder")
    assert not TidalBackend.supports_attn_type("encoder_only")


def test_graphs_are_for_uniform_batches_only():
    """FlashAttention 3 says ALWAYS, which would replay the split of one mixed batch for another."""
    support = TidalMetadataBuilder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_BATCH
    assert not TidalMetadataBuilder.supports_update_block_table
    assert TidalMetadataBuilder.reorder_batch_threshold == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "method"),
    [
        (TidalImpl, FlashAttentionImpl, "forward"),
        (TidalMetadataBuilder, FlashAttentionMetadataBuilder, "build"),
        (TidalMetadataBuilder, FlashAttentionMetadataBuilder, "__init__"),
    ],
)
def test_overridden_methods_take_what_flash_attention_takes(ours, theirs, method):
    names = [list(inspect.signature(getattr(cls, method)).parameters) for cls in (ours, theirs)]
    assert names[0] == names[1]


def test_a_layer_takes_what_flash_attention_takes():
    ours = [name for name in inspect.signature(TidalImpl.__init__).parameters if name != "extra"]
    theirs = list(inspect.signature(FlashAttentionImpl.__init__).parameters)
    assert theirs == [*ours, "sinks"]


def test_metadata_can_carry_a_step():
    assert not hasattr(FlashAttentionMetadata, "__slots__")
    read = "query_start_loc_cpu seq_lens block_table_tensor is_prefilling max_seq_len max_query_len"
    fields = set(CommonAttentionMetadata.__dataclass_fields__)
    assert fields >= set(read.split()) | {"num_reqs", "num_actual_tokens"}
