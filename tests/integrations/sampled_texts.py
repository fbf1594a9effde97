"""Texts sampled by a model so small that the chance of every text is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from runs import generate
from tiny import build, prompt
from transformers import LogitsProcessorList, PreTrainedModel

VOCABULARY, PROMPT, TOKENS, ROWS = 5, 12, 4, 1500
SIGMAS = 5.0
ONES = torch.ones(1, PROMPT, dtype=torch.long)
WARPERS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "top_k": {"temperature": 1.5, "top_k": 3},
    "top_p": {"temperature": 0.8, "top_p": 0.8, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "repetition": {"repetition_penalty": 1.3, "top_k": 0},
}


def tiny(spread: float = 0.25) -> PreTrainedModel:
    """A model of `VOCABULARY` words."""
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return build("Llama", vocab_size=VOCABULARY, initializer_range=spread, **size, **heads)


def ids() -> torch.Tensor:
    """The prompt ``[1, PROMPT]``."""
    return prompt(PROMPT) % VOCABULARY


@torch.no_grad()
def exact(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """Chances of all continuations of `TOKENS` tokens, ``[V^TOKENS]``, by full attention alone."""
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=TOKENS)))
    whole = torch.cat([ids().expand(len(texts), -1), texts], dim=1)
    logits = model(whole[:, :-1], use_cache=False).logits[:, PROMPT - 1 :].float()
    processors = processors_of(model, **options)
    chances = torch.ones(len(texts), dtype=torch.float64)
    for at in range(TOKENS):
        scores = processors(whole[:, : PROMPT + at], logits[:, at])
        chances *= scores.softmax(-1).double().gather(1, texts[:, at, None])[:, 0]
    return chances


def processors_of(model: PreTrainedModel, **options: Any) -> LogitsProcessorList:
    """Those that generate makes of ``options``."""
    seen = []

    def keep(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.append(logits_processor)
        return input_ids

    settings = {"do_sample": True, "max_new_tokens": TOKENS, **options}
    model.generate(ids(), attention_mask=ONES, custom_generate=keep, **settings)
    return seen[0]


def sample(model: PreTrainedModel, rows: int = ROWS, seed: int = 0, **options: Any) -> torch.Tensor:
    """``rows`` texts of `TOKENS` tokens ``[rows, PROMPT + TOKENS]``."""
    torch.manual_seed(seed)
    batch = ids().expand(rows, -1)
    settings = {"do_sample": True, "output_logits": False, **options}
    mask = ONES.expand(rows, -1)
    return generate(model, batch, TOKENS, attention_mask=mask, **settings).sequences


def excess(sequences: torch.Tensor, chances: torch.Tensor) -> float:
    """How far texts are from ``chances``, in standard deviations of chi-square; rare texts pooled."""
    places = torch.tensor([VOCABULARY**n for n in reversed(range(TOKENS))])
    texts = (sequences[:, PROMPT:] * places).sum(-1)
    counts = torch.bincount(texts, minlength=len(chances)).double()
    assert not counts[chances == 0].any()
    expected = chances * len(texts)
    common = expected >= 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom > 10
    return (statistic - freedom) / math.sqrt(2 * freedom)


def surprise(sequences: torch.Tensor, chances: torch.Tensor) -> float:
    """How far the texts' mean log-likelihood is from its expectation, in standard errors.

    It sees a distribution that is a little too sharp or too flat, which chi-square overlooks.
    """
    places = torch.tensor([VOCABULARY**n for n in reversed(range(TOKENS))])
    logs = torch.where(chances > 0, chances, 1.0).log()
    mean = float((chances * logs).sum())
    variance = float((chances * (logs - mean) ** 2).sum())
    found = float(logs[(sequences[:, PROMPT:] * places).sum(-1)].mean())
    return abs(found - mean) / math.sqrt(variance / len(sequences))
