"""Needle in a haystack: key-value needles hidden in a long text, then asked for.

A sample is a context (haystack, one needle, distractor needles) and a question about the one needle.
The question is meant to be fed token by token *after* a dense prefill of the context, so that every
token of it meets the method under test (the protocol of Quest, arXiv 2406.10774, section 4).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidaldecode.errors import TidalError
from tidaldecode.eval.words import ADJECTIVES, NOUNS

ANSWER_DIGITS = 7

Encode = Callable[[str], list[int]]


def statement_text(key: str, value: str) -> str:
    """The line that hides ``value`` under ``key``."""
    return f"# The code of {key} is {value}.\n"


def question_text(key: str) -> str:
    """The line that asks for ``key``; the value's digits follow it directly."""
    return f"# What is the code of {key}? "


def draw_key(rng: random.Random) -> str:
    """A two-word key such as ``amber falcon``."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def draw_value(rng: random.Random) -> str:
    """`ANSWER_DIGITS` decimal digits."""
    return "".join(rng.choice("0123456789") for _ in range(ANSWER_DIGITS))


@dataclass(frozen=True)
class NeedleSample:
    """One question. Ids are token ids of the tokenizer the haystack was encoded with."""

    context_ids: list[int]
    """Haystack with the needle and its distractors; to be prefilled densely."""
    question_ids: list[int]
    """The question; to be fed token by token."""
    answer_ids: list[int]
    """What greedy decoding should produce next."""
    depth: float
    """Where the needle lies: 0 at the beginning of the context, 1 at its end."""

    @property
    def total_tokens(self) -> int:
        """Tokens of context, question and answer together."""
        return len(self.context_ids) + len(self.question_ids) + len(self.answer_ids)


class Haystack:
    """A tokenised text from which windows are cut at line ends.

    Args:
        ids: token ids of the whole text.
        is_line_end: for every id of ``ids``, whether a line ends with that token.
    """

    def __init__(self, ids: Sequence[int], is_line_end: Sequence[bool]) -> None:
        self.ids = list(ids)
        self._line_ends = [index + 1 for index, flag in enumerate(is_line_end) if flag]
        if not self._line_ends:
            raise TidalError("haystack: expected a text with line breaks, found none")

    @classmethod
    def from_text(cls, text: str, encode: Encode, decode: Callable[[list[int]], str]) -> Haystack:
        """Tokenise ``text``; ``decode`` tells which tokens hold a line break."""
        ids = encode(text)
        breaks = {token: "\n" in decode([token]) for token in set(ids)}
        return cls(ids, [breaks[token] for token in ids])

    def window(self, tokens: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """``tokens`` consecutive ids starting after a line end, and the line ends within (or 0).

        Errors: `TidalError` when the haystack is shorter than ``tokens``.
        """
        starts = [end for end in self._line_ends if end + tokens <= len(self.ids)]
        if not starts:
            raise TidalError(
                f"haystack: expected more than {tokens:,} tokens, found {len(self.ids):,}; "
                "use a longer text or a shorter context"
            )
        start = rng.choice(starts)
        inside = [end - start for end in self._line_ends if start < end < start + tokens]
        return self.ids[start : start + tokens], inside or [0]


def make_sample(
    haystack: Haystack,
    encode: Encode,
    *,
    context_tokens: int,
    depth: float,
    distractors: int,
    rng: random.Random,
) -> NeedleSample:
    """Hide one needle at ``depth`` and ``distractors`` others anywhere, and ask for the one.

    The sample takes ``context_tokens`` tokens in all: context, question and answer.

    Errors: `TidalError` when the needles do not fit or ``depth`` lies outside [0, 1].
    """
    if not 0.0 <= depth <= 1.0:
        raise TidalError(f"depth: expected a number from 0 to 1, got {depth}")
    keys: list[str] = []
    while len(keys) < distractors + 1:
        key = draw_key(rng)
        if key not in keys:
            keys.append(key)
    values = [draw_value(rng) for _ in keys]
    statements = [encode(statement_text(k, v)) for k, v in zip(keys, values, strict=True)]
    question, answer = encode(question_text(keys[0])), encode(values[0])
    fill = context_tokens - len(question) - len(answer) - sum(map(len, statements))
    if fill < 1:
        raise TidalError(
            f"context: expected room for {distractors + 1} needles and a question, got "
            f"{context_tokens} tokens; ask for at least {context_tokens - fill + 1}"
        )
    window, line_ends = haystack.window(fill, rng)
    depths = [depth, *(rng.random() for _ in range(distractors))]
    places = [_nearest(line_ends, share * fill) for share in depths]
    context = list(window)
    for place, statement in sorted(zip(places, statements, strict=True), reverse=True):
        context[place:place] = statement
    return NeedleSample(context, question, answer, depth)


def _nearest(line_ends: Sequence[int], target: float) -> int:
    return min(line_ends, key=lambda end: abs(end - target))
