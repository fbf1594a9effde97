"""What is refused, and with which words; needs no vLLM."""

from types import SimpleNamespace as Bag
from typing import Any

import pytest

from tidaldecode import TidalError
from tidaldecode.integrations.vllm.support import check_engine, check_layer, check_version


def engine(**changes: Any) -> Bag:
    """What `check_engine` reads of a VllmConfig."""
    text = Bag(attn_logit_softcapping=changes.get("softcap"))
    return Bag(
        model_config=Bag(use_mla=changes.get("mla", False), hf_text_config=text),
        cache_config=Bag(cache_dtype=changes.get("cache_dtype", "auto")),
        parallel_config=Bag(
            decode_context_parallel_size=changes.get("dcp", 1),
            prefill_context_parallel_size=changes.get("pcp", 1),
            enable_dbo=changes.get("dbo", False),
        ),
        speculative_config=changes.get("speculation"),
    )


PLAIN: dict[str, Any] = {
    "alibi_slopes": None,
    "kv_cache_dtype": "auto",
    "logits_soft_cap": None,
    "attn_type": "decoder",
    "kv_sharing_target_layer_name": None,
    "sinks": None,
}


@pytest.mark.parametrize("version", ["0.26.0", "0.30.1", "0.33.0", "0.33.7+cpu"])
def test_supported_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused_by_name(version):
    with pytest.raises(TidalError, match=version):
        check_version(version)


def test_a_plain_engine_and_layer_pass():
    check_engine(engine())
    check_layer(**PLAIN)
    check_layer(**{**PLAIN, "logits_soft_cap": 0})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mla": True}, "MLA"),
        ({"softcap": 50.0}, "soft-capping"),
        ({"cache_dtype": "fp8"}, "kv-cache-dtype fp8"),
        ({"cache_dtype": "fp8_e5m2"}, "kv-cache-dtype fp8_e5m2"),
        ({"dcp": 2}, "decode-context-parallel-size"),
        ({"pcp": 2}, "prefill-context-parallel-size"),
        ({"dbo": True}, "dual batch overlap"),
        ({"speculation": object()}, "speculative"),
    ],
)
def test_an_engine_that_would_decode_wrongly_is_refused(changes, named):
    with pytest.raises(TidalError, match=named):
        check_engine(engine(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"logits_soft_cap": 30.0}, "soft-capped"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "another layer"),
        ({"sinks": object()}, "sinks"),
    ],
)
def test_a_layer_that_would_decode_wrongly_is_refused(changes, named):
    with pytest.raises(TidalError, match=named):
        check_layer(**{**PLAIN, **changes})
