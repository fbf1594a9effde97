"""Runs needle questions over a grid of context length x depth, by every method."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tidaldecode.config import TidalConfig
from tidaldecode.eval.engine import Engine
from tidaldecode.eval.needle import Encode, Haystack, make_sample


@dataclass(frozen=True)
class Method:
    """A way to decode, as results name it. ``config`` None is full attention."""

    name: str
    config: TidalConfig | None


@dataclass(frozen=True)
class NeedleGrid:
    """Which questions are asked."""

    contexts: tuple[int, ...]
    """Lengths in tokens: context, question and answer together."""
    depths: tuple[float, ...]
    """Where the needle lies, from 0 (beginning) to 1 (end)."""
    samples: int
    """Questions per context and depth."""
    distractors: int
    """Other needles in the same context."""
    seed: int = 0

    def cells(self) -> list[tuple[int, float, int]]:
        """``(context, depth, sample)`` of every question."""
        return [
            (context, depth, sample)
            for context in self.contexts
            for depth in self.depths
            for sample in range(self.samples)
        ]


@dataclass(frozen=True)
class NeedleRow:
    """One question, answered by one method."""

    method: str
    context: int
    depth: float
    sample: int
    exact: bool
    """All digits of the answer right."""
    token_accuracy: float
    """Share of the answer's tokens that are right."""
    step_ms: float
    """Median wall time of a decode step in milliseconds."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def run_needle(
    engine: Engine,
    haystack: Haystack,
    encode: Encode,
    methods: Sequence[Method],
    grid: NeedleGrid,
    on_row: Callable[[NeedleRow], None] = lambda row: None,
) -> list[NeedleRow]:
    """Ask every question of ``grid`` by every method; each context is prefilled once.

    ``on_row`` sees each row as soon as it is there.

    Errors: `TidalError` when the haystack is too short for a context.
    """
    rows = []
    for context, depth, index in grid.cells():
        sample = make_sample(
            haystack,
            encode,
            context_tokens=context,
            depth=depth,
            distractors=grid.distractors,
            rng=random.Random(f"{grid.seed}/{context}/{depth}/{index}"),
        )
        engine.prefill(sample.context_ids)
        for method in methods:
            answer = sample.answer_ids
            tokens, seconds = engine.decode(sample.question_ids, len(answer), method.config)
            right = [got == want for got, want in zip(tokens, answer, strict=True)]
            rows.append(
                NeedleRow(
                    method=method.name,
                    context=context,
                    depth=depth,
                    sample=index,
                    exact=all(right),
                    token_accuracy=sum(right) / len(right),
                    step_ms=statistics.median(seconds) * 1e3,
                )
            )
            on_row(rows[-1])
    return rows
