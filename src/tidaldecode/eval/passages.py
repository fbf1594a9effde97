"""Passages: windows of a text, a context to prefill and what follows it, to be decoded."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tidaldecode.errors import TidalError
from tidaldecode.eval.needle import Haystack


@dataclass(frozen=True)
class Passage:
    """One window of a text."""

    context_ids: list[int]
    """Tokens to be prefilled densely: all of the context but its last token."""
    decoded_ids: list[int]
    """The context's last token, and the text that follows: every step's input, and the last target."""


@dataclass(frozen=True)
class PassageSet:
    """``samples`` windows of ``context`` tokens each, with ``new_tokens`` to decode after them.

    The windows start in equal parts of the text, so that they differ as much as it allows.
    """

    text: Haystack
    context: int
    new_tokens: int
    samples: int
    seed: int = 0

    def keys(self) -> list[str]:
        """``context/number`` of every passage."""
        return [f"{self.context}/{number}" for number in range(self.samples)]

    def build(self, key: str) -> Passage:
        """The passage of that name. Errors: `TidalError` when the text is too short."""
        if self.context < 2 or self.new_tokens < 1:
            raise TidalError(
                f"context: expected 2 tokens or more and 1 to decode, got {self.context} and "
                f"{self.new_tokens}"
            )
        rng = random.Random(f"{self.seed}/{key}")
        part = (int(key.rpartition("/")[2]), self.samples)
        ids, _ = self.text.window(self.context + self.new_tokens, rng, part)
        return Passage(ids[: self.context - 1], ids[self.context - 1 :])
