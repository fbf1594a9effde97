"""Needle in a haystack: key-value needles hidden in a long text, then asked for.

A sample is a context (haystack, one needle, distractor needles) and a question about the one needle.
The question is meant to be fed token by token *after* a dense prefill of the context, so that every
token of it meets the method under test (the protocol of Quest, arXiv 2406.10774, section 4).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tidaldecode.errors import TidalError
from tidaldecode.eval.words import ADJECTIVES, NOUNS

ANSWER_DIGITS = 7

Encode = Callable[[str], list[int]]


KINDS = ("single", "multi-key", "multi-query", "multi-value")
"""One needle; one among distractors; several asked one after another; several values of one key."""


def statement_text(key: str, value: str) -> str:
    """The line that hides ``value`` under ``key``."""
    return f"# The code of {key} is {value}.\n"


def question_text(key: str, values: int = 1) -> str:
    """The line that asks for ``key``; the digits of its value, or values, follow it directly."""
    if values == 1:
        return f"# What is the code of {key}? "
    return f"# What are the {values} codes of {key}? "


def draw_key(rng: random.Random) -> str:
    """A two-word key such as ``amber falcon``."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def draw_value(rng: random.Random) -> str:
    """`ANSWER_DIGITS` decimal digits."""
    return "".join(rng.choice("0123456789") for _ in range(ANSWER_DIGITS))


@dataclass(frozen=True)
class NeedleShape:
    """How many needles a context hides and how many of them are asked for."""

    distractors: int = 8
    """Needles that nobody asks for."""
    queries: int = 1
    """Needles that are asked for, one after another."""
    values: int = 1
    """Values of a needle that is asked for; all have to be told, in any order."""

    @classmethod
    def of_kind(cls, kind: str, distractors: int = 8) -> NeedleShape:
        """The shape of one of `KINDS`. Errors: `TidalError` for another name."""
        shapes = {
            "single": cls(distractors=0),
            "multi-key": cls(distractors=distractors),
            "multi-query": cls(distractors=distractors, queries=4),
            "multi-value": cls(distractors=distractors, values=3),
        }
        if kind not in shapes:
            raise TidalError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        return shapes[kind]


@dataclass(frozen=True)
class Answer:
    """What should be decoded: at step ``first_step`` (from 0) the first of ``ids``, and so on."""

    first_step: int
    ids: list[int]


@dataclass(frozen=True)
class NeedleSample:
    """One context and its questions. Ids are those of the tokenizer that encoded the haystack."""

    context_ids: list[int]
    """Haystack with all needles; to be prefilled densely."""
    script: list[int | None]
    """Questions, to be fed token by token; None where the model's own answer is fed."""
    answers: list[Answer]
    """The right answers, one for each value."""
    values: list[str]
    """Texts of the answers."""
    depth: float
    """Where the first needle lies: 0 at the beginning of the context, 1 at its end."""
    any_order: bool = False
    """Whether the values count wherever they are told."""

    @property
    def solved(self) -> list[int]:
        """The script with the right answers in it, the last token of the last one included."""
        filled = dict(enumerate(self.script))
        for answer in self.answers:
            for offset, token in enumerate(answer.ids):
                filled[answer.first_step + 1 + offset] = token
        tokens = [filled[step] for step in sorted(filled)]
        assert all(token is not None for token in tokens)
        return [token for token in tokens if token is not None]

    @property
    def total_tokens(self) -> int:
        """Tokens of context, questions and answers together."""
        return len(self.context_ids) + len(self.solved)


def decode_tail(sample: NeedleSample, tokens: int) -> NeedleSample:
    """The same question, with the last ``tokens`` of the context decoded instead of prefilled.

    Errors: `TidalError` where the context is not longer than that.
    """
    if tokens >= len(sample.context_ids):
        raise TidalError(
            f"decoded-tokens: expected fewer than the {len(sample.context_ids):,} tokens of the "
            f"context, got {tokens:,}"
        )
    split = len(sample.context_ids) - tokens
    return replace(
        sample,
        context_ids=sample.context_ids[:split],
        script=[*sample.context_ids[split:], *sample.script],
        answers=[replace(one, first_step=one.first_step + tokens) for one in sample.answers],
    )


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

    def window(
        self, tokens: int, rng: random.Random, part: tuple[int, int] = (0, 1)
    ) -> tuple[list[int], list[int]]:
        """``tokens`` consecutive ids starting after a line end, and the line ends within (or 0).

        ``part`` (index, count): the window starts in that one of so many equal parts of the text.

        Errors: `TidalError` when the haystack is shorter than ``tokens``.
        """
        starts = [end for end in self._line_ends if end + tokens <= len(self.ids)]
        if not starts:
            raise TidalError(
                f"haystack: expected more than {tokens:,} tokens after a line break, found "
                f"{len(self.ids):,} in all; use a longer text or a shorter context"
            )
        index, count = part
        first, last = len(starts) * index // count, len(starts) * (index + 1) // count
        start = rng.choice(starts[first : max(last, first + 1)])
        inside = [end - start for end in self._line_ends if start < end < start + tokens]
        return self.ids[start : start + tokens], inside or [0]


def make_sample(
    haystack: Haystack,
    encode: Encode,
    *,
    context_tokens: int,
    depth: float,
    rng: random.Random,
    shape: NeedleShape | None = None,
) -> NeedleSample:
    """Hide a needle at ``depth`` and the others of ``shape`` anywhere, and ask.

    The sample takes ``context_tokens`` tokens in all: context, questions and answers.

    Errors: `TidalError` when the needles do not fit or ``depth`` lies outside [0, 1].
    """
    if not 0.0 <= depth <= 1.0:
        raise TidalError(f"depth: expected a number from 0 to 1, got {depth}")
    shape = shape or NeedleShape()
    keys: list[str] = []
    while len(keys) < shape.queries + shape.distractors:
        key = draw_key(rng)
        if key not in keys:
            keys.append(key)
    pairs = [(key, draw_value(rng)) for key in keys]
    asked = [(key, [value]) for key, value in pairs[: shape.queries]]
    for key, values in asked:
        for _ in range(shape.values - 1):
            values.append(draw_value(rng))
            pairs.append((key, values[-1]))
    statements = [encode(statement_text(key, value)) for key, value in pairs]
    script, answers = _questions(encode, asked)
    solved = 1 + max(answer.first_step + len(answer.ids) for answer in answers)
    fill = context_tokens - solved - sum(map(len, statements))
    if fill < 1:
        raise TidalError(
            f"context: expected room for {len(pairs)} needles and a question, got "
            f"{context_tokens} tokens; ask for at least {context_tokens - fill + 1}"
        )
    window, line_ends = haystack.window(fill, rng)
    depths = [depth, *(rng.random() for _ in statements[1:])]
    places = [_nearest(line_ends, share * fill) for share in depths]
    context = list(window)
    for place, statement in sorted(zip(places, statements, strict=True), reverse=True):
        context[place:place] = statement
    return NeedleSample(
        context,
        script,
        answers,
        [value for _, values in asked for value in values],
        depth,
        any_order=shape.values > 1,
    )


def _questions(
    encode: Encode, asked: list[tuple[str, list[str]]]
) -> tuple[list[int | None], list[Answer]]:
    """Script and answers of questions asked one after another, each answered by the model itself."""
    script: list[int | None] = []
    answers: list[Answer] = []
    for key, values in asked:
        if script:
            script += [None, *encode("\n")]
        script += encode(question_text(key, len(values)))
        for index, value in enumerate(values):
            ids = encode(value)
            if index:
                script += [None, *encode(", ")]
            answers.append(Answer(len(script) - 1, ids))
            script += [None] * (len(ids) - 1)
    return script, answers


def score_answer(
    sample: NeedleSample, tokens: Sequence[int], decode: Callable[[list[int]], str]
) -> tuple[bool, float]:
    """Whether every answer is right, and the share that is; ``tokens`` are those of every step.

    The share counts answer tokens; where the order of several values is free, it counts values
    (RULER's "all" rule, arXiv 2404.06654).
    """
    if sample.any_order:
        told = {
            decode(list(tokens[answer.first_step :][: len(answer.ids)])).strip()
            for answer in sample.answers
        }
        found = [value in told for value in sample.values]
        return all(found), sum(found) / len(found)
    right = [
        tokens[answer.first_step + offset] == token
        for answer in sample.answers
        for offset, token in enumerate(answer.ids)
    ]
    return all(right), sum(right) / len(right)


def _nearest(line_ends: Sequence[int], target: float) -> int:
    return min(line_ends, key=lambda end: abs(end - target))
