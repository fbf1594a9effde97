"""What may stand in --additional-config; needs no vLLM."""

import pytest

from tidaldecode import TidalError
from tidaldecode.integrations.vllm.options import KEY, OF_CONFIG, OF_SERVER, read_options


def test_nothing_is_required():
    assert dict(read_options({}).overrides) == {}
    assert read_options({KEY: {}}).min_context == 0


def test_every_named_option_is_taken_over():
    section = {
        "budget": 256,
        "dense_layers": 1,
        "select_layers": [2, 13],
        "granularity": "query_head",
        "score": "logits",
        "sink_tokens": 2,
        "recent_tokens": 7,
        "backend": "torch",
    }
    assert set(section) == set(OF_CONFIG)
    server = {"min_context": 4096, "scratch_mib": 64}
    assert set(server) == set(OF_SERVER)
    options = read_options({KEY: {**section, **server}, "another_plugin": 1})
    assert dict(options.overrides) == section
    assert (options.min_context, options.scratch_mib) == (4096, 64)


@pytest.mark.parametrize("section", [{"score": "logits"}, {"sink_tokens": 2000}])
def test_an_option_that_the_file_beside_the_model_may_complete_is_taken(section):
    assert dict(read_options({KEY: section}).overrides) == section


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"bugdet": 256}, "'bugdet'"),
        ({"mode": "sparse"}, "'mode'"),
        ({"cuda_graph": False}, "'cuda_graph'"),
        ({"selector": "page_bounds"}, "'selector'"),
        ({"budget": 0}, "budget"),
        ({"budget": "1024"}, "budget"),
        ({"budget": 8, "sink_tokens": 4, "recent_tokens": 4}, "budget"),
        ({"granularity": "token"}, "granularity"),
        ({"granularity": "kv_head", "score": "logits"}, "score"),
        ({"select_layers": []}, "select_layers"),
        ({"select_layers": [3, 2]}, "select_layers"),
        ({"min_context": -1}, "min_context"),
        ({"min_context": True}, "min_context"),
        ({"scratch_mib": 0}, "scratch_mib"),
        ({"scratch_mib": "512"}, "scratch_mib"),
        ([("budget", 1)], "JSON object"),
    ],
)
def test_a_bad_option_is_refused_by_name(section, named):
    with pytest.raises(TidalError, match=named):
        read_options({KEY: section})
