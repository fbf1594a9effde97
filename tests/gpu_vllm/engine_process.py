"""Engines on the GPU, each in a process of its own: vLLM's pool of graphs outlives an engine.

Importable without vLLM, which a process imports when it serves.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from tidaldecode.demo import MODEL_DIRECTORY

BUDGET, CHUNK = 64, 512
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
ENGINES = {
    "stock": (None, {"enforce_eager": True}),
    "eager": ({"budget": BUDGET}, {"enforce_eager": True}),
    "graph": ({"budget": BUDGET}, {"compilation_config": GRAPHS}),
    "compiled": ({"budget": BUDGET}, {}),
    "large eager": ({"budget": 8192}, {"enforce_eager": True}),
    "large graph": ({"budget": 8192}, {"compilation_config": GRAPHS}),
    "parts": (
        {"budget": BUDGET, "granularity": "kv_head", "scratch_mib": 1},
        {"compilation_config": GRAPHS},
    ),
    "whole": ({"budget": BUDGET, "granularity": "kv_head"}, {"compilation_config": GRAPHS}),
    "mixed": ({"budget": BUDGET, "min_context": 1500}, {"compilation_config": GRAPHS}),
}
"""TidalDecode's options, None for FlashAttention alone, and the engine's."""
Job = tuple[list[list[int]], int]
"""Prompts to answer at once, and how many tokens each is to get."""
_AT_ONCE = 4


@dataclass(frozen=True)
class Told:
    """A row's greedy tokens, and the log-probabilities of the likeliest ones at each."""

    tokens: list[int]
    likely: list[dict[int, float]]


def serve_all(jobs: Mapping[str, Sequence[Job]]) -> dict[str, list[list[Told]]]:
    """The answers of every engine to all of its jobs; a few engines run at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_AT_ONCE, mp_context=context, max_tasks_per_child=1) as pool:
        running = {name: pool.submit(serve, name, list(mine)) for name, mine in jobs.items()}
        return {name: answers.result() for name, answers in running.items()}


def serve(name: str, jobs: list[Job]) -> list[list[Told]]:
    """Start an engine and let it do its jobs, one after the other."""
    engine = start(name)
    return [run(engine, prompts, new_tokens) for prompts, new_tokens in jobs]


def start(name: str) -> Any:
    """An engine, as `ENGINES` has it."""
    from vllm import LLM

    options, engine = ENGINES[name]
    ours: dict[str, Any] = {"attention_backend": "FLASH_ATTN"}
    if options is not None:
        ours = {"attention_backend": "CUSTOM", "additional_config": {"tidaldecode": options}}
    return LLM(
        str(MODEL_DIRECTORY),
        dtype="float16",
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.15,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
        **ours,
        **engine,
    )


def run(engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Told]:
    """Greedy answers to ``prompts``, submitted at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=8
    )
    found = engine.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
    )
    outputs = [one.outputs[0] for one in found]
    return [
        Told(
            list(out.token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in out.logprobs],
        )
        for out in outputs
    ]
