"""Tensor and pipeline parallelism: two processes of the real engine, over gloo."""

import pytest

pytest.importorskip("vllm.config", reason="make test-vllm installs vLLM")

import vllm
from engines import generate, host_tokens, prompt, serve

NEW = 24
# The second stage stops at "assert self.intermediate_tensors is not None", before any attention runs.
pipelines = pytest.mark.skipif(
    vllm.__version__.startswith("0.33."),
    reason="vLLM 0.33's CPU runner fails in its own code with pipeline stages",
)
PROMPTS = [prompt(length, seed) for seed, length in enumerate((100, 61, 75, 33))]
KV_HEAD = {"budget": 32, "granularity": "kv_head"}


def two(options, **engine):
    """An engine of two workers; its tokens, once it has stopped."""
    started = serve(options, distributed_executor_backend="mp", **engine)
    try:
        return generate(started, PROMPTS, NEW)
    finally:
        started.llm_engine.engine_core.shutdown()


def test_tensor_parallel_sets_per_kv_head_are_those_of_one_process():
    tokens = two(KV_HEAD, tensor_parallel_size=2)
    assert tokens == host_tokens(PROMPTS, NEW, **KV_HEAD)
    assert tokens != host_tokens(PROMPTS, NEW)


@pipelines
def test_pipeline_parallel_full_attention_is_full_attention():
    tokens = two({"budget": 512}, pipeline_parallel_size=2)
    assert tokens == host_tokens(PROMPTS, NEW)


@pipelines
def test_pipeline_parallel_stages_select_for_themselves():
    """Twelve layers in two stages: layer 6 begins the second, and selects though nobody named it."""
    tokens = two({"budget": 32, "select_layers": [2, 3]}, pipeline_parallel_size=2)
    assert tokens == host_tokens(PROMPTS, NEW, budget=32, select_layers=(2, 3, 6))
    assert tokens != host_tokens(PROMPTS, NEW, budget=32, select_layers=(2, 3))
