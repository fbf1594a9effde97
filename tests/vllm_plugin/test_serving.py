"""The whole engine on a CPU: its tokens are those of the transformers integration, one for one.

The engine batches, pages, chunks and caches as it likes; the reference decodes every prompt alone.
"""

import pytest

pytest.importorskip("vllm.config", reason="make test-vllm installs vLLM")

from engines import BLOCK, generate, host_tokens, paper, prompt, run, serve, sparse_tail_tokens

from tidaldecode import TidalError

NEW = 24
PROMPTS = [prompt(length, seed) for seed, length in enumerate((100, 61, 130, 2, 97, 1, 75, 33))]
LENGTHS = [24, 9, 17, 40, 5, 30, 12, 24]
SHARED = {"budget": 32}
KV_HEAD = {"budget": 32, "granularity": "kv_head", "select_layers": (2, 6)}


@pytest.fixture(scope="module")
def shared():
    """Chunks of 32 tokens and a prefix cache; long prompts come in pieces, beside decoding rows."""
    return serve(SHARED, max_num_batched_tokens=32, enable_prefix_caching=True)


def test_the_reference_can_tell_sparse_from_dense():
    sparse, dense = host_tokens(PROMPTS, NEW, **SHARED), host_tokens(PROMPTS, NEW)
    assert sum(a != b for a, b in zip(sparse, dense, strict=True)) >= 4


def test_a_budget_above_every_context_is_full_attention():
    engine = serve({"budget": 512})
    assert generate(engine, PROMPTS, LENGTHS) == host_tokens(PROMPTS, LENGTHS)


def test_one_sequence_with_a_small_budget(shared):
    assert generate(shared, [prompt(100, 50)], NEW) == host_tokens([prompt(100, 50)], NEW, **SHARED)


def test_a_batch_that_grows_and_shrinks_with_prompts_in_chunks(shared):
    """Eight requests for three places: prompts arrive while others decode, and rows end at all times."""
    assert generate(shared, PROMPTS, LENGTHS) == host_tokens(PROMPTS, LENGTHS, **SHARED)


@pytest.mark.parametrize(("length", "seed"), [(65, 3), (65, 7), (97, 9)])
def test_the_last_token_of_a_prompt_in_chunks_is_prefill(shared, length, seed):
    """Alone it looks like a decode step; its attention must be dense, or its K/V are wrong for good."""
    tokens = prompt(length, seed)
    expected = host_tokens([tokens], NEW, **SHARED)
    assert expected != [sparse_tail_tokens(tokens, NEW, **SHARED)]
    assert generate(shared, [tokens], NEW) == expected


def test_a_prefix_hit_of_all_but_one_token(shared):
    tokens = prompt(6 * BLOCK + 1, 11)
    expected = host_tokens([tokens], NEW, **SHARED)
    assert expected != [sparse_tail_tokens(tokens, NEW, **SHARED)]
    assert generate(shared, [tokens], NEW) == expected
    (again,) = run(shared, [tokens], NEW)
    assert again.num_cached_tokens == 6 * BLOCK
    assert list(again.outputs[0].token_ids) == expected[0]


def test_a_prefix_hit_beside_other_sequences(shared):
    prefix = prompt(5 * BLOCK, 80)
    prompts = [prefix + prompt(7, 81), prefix + prompt(20, 82), prompt(90, 83)]
    generate(shared, prompts[:1], 1)
    results = run(shared, prompts, NEW)
    assert [result.num_cached_tokens >= 5 * BLOCK for result in results] == [True, True, False]
    tokens = [list(result.outputs[0].token_ids) for result in results]
    assert tokens == host_tokens(prompts, NEW, **SHARED)


@pytest.mark.parametrize("options", [KV_HEAD, paper(24)], ids=["kv_head", "paper"])
def test_other_granularities(options):
    engine = serve(options)
    assert generate(engine, PROMPTS, LENGTHS) == host_tokens(PROMPTS, LENGTHS, **options)


def test_preempted_sequences_come_back():
    """Blocks for two and a half of the three sequences: one is thrown out and computed again."""
    prompts = [prompt(length, 100 + length) for length in (60, 62, 64)]
    engine = serve(
        {"budget": 512}, num_gpu_blocks_override=16, max_model_len=128, disable_log_stats=False
    )
    assert generate(engine, prompts, 40) == host_tokens(prompts, 40)
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    assert metrics["vllm:num_preemptions"].value > 0


def test_a_bad_option_stops_the_engine_before_it_loads_weights():
    with pytest.raises(TidalError, match="'bugdet'"):
        serve({"bugdet": 32})


def test_an_fp8_cache_stops_the_engine():
    with pytest.raises(TidalError, match="KV cache of fp8"):
        serve(SHARED, kv_cache_dtype="fp8")


def test_sequences_below_min_context_are_dense_beside_sparse_ones():
    engine = serve({**SHARED, "min_context": 80})
    prompts = [prompt(100, 90), prompt(50, 91), prompt(120, 92)]
    long = host_tokens([prompts[0], prompts[2]], NEW, **SHARED)
    short = host_tokens([prompts[1]], NEW)
    assert short != host_tokens([prompts[1]], NEW, **SHARED)
    assert generate(engine, prompts, NEW) == [long[0], short[0], long[1]]
