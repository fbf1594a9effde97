"""Streams text from a prompt, and compares the sparse text with full attention's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from tidaldecode.algorithm.tally import Tally
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.handle import enable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """One generated continuation."""

    tokens: list[int]
    prefill_seconds: float
    """Until the first new token was there."""
    decode_seconds: float
    """For all the tokens after the first."""
    tally: Tally | None = None
    """What was drafted and verified, in lossless mode."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, prefill and first token left out; None for fewer than two tokens."""
        if len(self.tokens) < 2 or self.decode_seconds <= 0:
            return None
        return (len(self.tokens) - 1) / self.decode_seconds


class _Collector(BaseStreamer):  # type: ignore[misc]
    """Passes on every new token and notes when the first and the last one came."""

    def __init__(self, on_tokens: Callable[[list[int]], None]) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._on_tokens = on_tokens
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Called by generate: first with the prompt, then with every new token."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.tokens += value.flatten().tolist()
        self._on_tokens(self.tokens)

    def end(self) -> None:
        """Called by generate after the last token."""


def encode_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> list[int]:
    """Token ids of ``prompt``. Errors: `TidalError` if it is empty or does not fit the model."""
    ids: list[int] = tokenizer(prompt).input_ids
    if not ids:
        raise TidalError("prompt: expected at least one token of text, got an empty prompt")
    limit = getattr(model.get_decoder().config, "max_position_embeddings", None)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise TidalError(
            f"prompt: expected at most {limit:,} tokens (the model's context) with "
            f"max-new-tokens={max_new_tokens}, got {len(ids):,} + {max_new_tokens}; shorten the "
            "prompt or ask for fewer tokens"
        )
    return ids


def generate_tokens(
    model: PreTrainedModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    config: TidalConfig | None,
    on_tokens: Callable[[list[int]], None] = lambda tokens: None,
    **sampling: Any,
) -> Generation:
    """Continue ``ids`` with TidalDecode, or with full attention where ``config`` is None.

    ``on_tokens`` sees all new tokens so far after each one; ``sampling`` goes to ``generate``.
    """
    collector = _Collector(on_tokens)
    inputs = torch.tensor([list(ids)], device=model.device)
    begin = time.perf_counter()
    with enable(model, config) if config is not None else nullcontext() as handle:
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            streamer=collector,
            **sampling,
        )
        drafts = handle is not None and handle.config.mode == "lossless"
        tally = handle.stats() if handle is not None and drafts else None
    first, last = (collector.times or [begin])[0], (collector.times or [begin])[-1]
    return Generation(collector.tokens, first - begin, last - first, tally)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, or None where they are equal."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))
