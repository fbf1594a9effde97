"""Prompts of mixed kinds and lengths: needle questions and unfinished code, half each."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tidaldecode.errors import TidalError
from tidaldecode.eval.needle import Encode, Haystack, make_sample


@dataclass(frozen=True)
class PromptSet:
    """``count`` prompts of ``shortest`` to ``longest`` tokens, drawn from ``seed``.

    A prompt depends on its number alone, so a long set can be gone through in pieces from ``first`` on.
    """

    count: int
    shortest: int
    longest: int
    seed: int = 0
    first: int = 0

    def build(self, haystack: Haystack, encode: Encode) -> list[list[int]]:
        """Token ids of all prompts; lengths are spread evenly over the logarithm.

        Errors: `TidalError` for lengths that make no sense, or a text that is too short.
        """
        if not 1 <= self.shortest <= self.longest:
            raise TidalError(
                f"lengths: expected 1 <= shortest <= longest, got {self.shortest} and {self.longest}"
            )
        numbers = range(self.first, self.first + self.count)
        return [self._prompt(number, haystack, encode) for number in numbers]

    def _prompt(self, number: int, haystack: Haystack, encode: Encode) -> list[int]:
        rng = random.Random(f"{self.seed}/{number}")
        length = round(self.shortest * (self.longest / self.shortest) ** rng.random())
        if number % 2:
            return haystack.window(length, rng)[0]
        sample = make_sample(haystack, encode, context_tokens=length, depth=rng.random(), rng=rng)
        asked = [token for token in sample.script if token is not None]
        return sample.context_ids + asked
