"""The real vLLM engine on a CPU, and the transformers integration that it is compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import tidaldecode
from tidaldecode import TidalConfig

MODEL = str(Path(tidaldecode.__file__).parent / "demo" / "model")
BLOCK = 16
TINY: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "attention_backend": "CUSTOM",
    "block_size": BLOCK,
    "max_model_len": 512,
    "max_num_seqs": 3,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
    "additional_config": {"tidaldecode": {}},
}


def serve(options: dict[str, Any], **engine: Any) -> Any:
    """An engine with these TidalDecode options."""
    from vllm import LLM

    settings = {**TINY, "additional_config": {"tidaldecode": options}, **engine}
    return LLM(MODEL, **settings)


def generate(
    engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int]
) -> list[list[int]]:
    """Greedy tokens of all prompts, submitted at once."""
    return [list(out.outputs[0].token_ids) for out in run(engine, prompts, new_tokens)]


def run(engine: Any, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int]) -> Any:
    """The engine's own results."""
    from vllm import SamplingParams

    lengths = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    return engine.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        [
            SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False)
            for length in lengths
        ],
        use_tqdm=False,
    )


@functools.cache
def host_model() -> PreTrainedModel:
    """The embedded model in transformers."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def host_tokens(
    prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int], **options: Any
) -> list[list[int]]:
    """Greedy tokens of each prompt alone; sparse with ``options``, full attention without."""
    lengths = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    return [
        list(_host(tuple(prompt), length, tuple(sorted(options.items()))))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


@functools.cache
def _host(
    prompt: tuple[int, ...], new_tokens: int, options: tuple[tuple[str, Any], ...]
) -> tuple[int, ...]:
    model = host_model()

    def decode() -> tuple[int, ...]:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return tuple(out[0, len(prompt) :].tolist())

    if not options:
        return decode()
    with tidaldecode.enable(model, **dict(options)):
        return decode()


def sparse_tail_tokens(tokens: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
    """What a host makes of a prompt whose last token it takes for a decode step: not what is wanted."""
    model, cache = host_model(), DynamicCache()
    with tidaldecode.enable(model, **options), torch.no_grad():
        model(torch.tensor([tokens[:-1]]), past_key_values=cache)
        out = model.generate(
            torch.tensor([tokens]),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(tokens) :].tolist()


def paper(budget: int) -> dict[str, Any]:
    """The options of the preset ``paper``, which vLLM's options spell out."""
    config = TidalConfig.preset("paper", budget=budget)
    names = ("granularity", "score", "sink_tokens", "recent_tokens")
    return {"budget": budget, **{name: getattr(config, name) for name in names}}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens of the embedded model's vocabulary, none of them its end of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 4096, (length,), generator=generator).tolist()
