"""What several tests of evaluation share: characters as tokens, an engine that reads, a tiny model."""

from __future__ import annotations

import random
import re

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tidaldecode.engine import Step
from tidaldecode.eval.needle import Haystack

VOCABULARY = 96


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


LINES = Haystack.from_text("".join(f"line {n}\n" for n in range(900)), encode, decode)


class ReadingEngine:
    """An engine that looks answers up in the context; a sparse method gets last digits wrong."""

    def __init__(self) -> None:
        self.prefilled: list[int] = []
        self.runs = 0
        self.contexts: list[str] = []

    def prefill(self, rows):
        self.prefilled.append(len(rows))
        self.contexts = [decode(row) for row in rows]

    def steps(self, scripts, config, on_scores=None):
        self.runs += 1
        fed, tokens = [""] * len(scripts), [0] * len(scripts)
        for index in range(max(map(len, scripts))):
            for row, script in enumerate(scripts):
                forced = script[index] if index < len(script) else None
                fed[row] += chr(tokens[row] if forced is None else forced)
            tokens = [
                ord(next_character(text, context, config is not None))
                for text, context in zip(fed, self.contexts, strict=True)
            ]
            yield Step(torch.zeros(len(scripts), 1), list(tokens), 0.002)


def next_character(text: str, context: str, forgetful: bool) -> str:
    """What follows the last question of ``text`` and the part of the answer given so far."""
    line = text.rpartition("\n")[2]
    asked = re.fullmatch(r"# What (?:is the code|are the \d codes) of (\w+ \w+)\? (.*)", line)
    if asked is None:
        return "?"
    key, told = asked.groups()
    answer = ", ".join(re.findall(rf"# The code of {key} is (\d{{7}})\.\n", context)) + "\n"
    right = answer[len(told)]
    if forgetful and not answer[len(told) + 1 : len(told) + 2].isdigit() and right.isdigit():
        return "0" if right != "0" else "1"
    return right


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Random weights, large enough that a wrong set of tokens shows in the logits."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


def random_text(tokens: int = 2000) -> Haystack:
    """Random tokens of the tiny model, a line end in every seventh place."""
    rng = random.Random(0)
    ids = [rng.randrange(VOCABULARY) for _ in range(tokens)]
    return Haystack(ids, [index % 7 == 6 for index in range(tokens)])
