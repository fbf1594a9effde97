"""Needle questions over a grid of kind x context length x depth."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tidaldecode.engine import Engine
from tidaldecode.eval.methods import Method
from tidaldecode.eval.needle import (
    Encode,
    Haystack,
    NeedleSample,
    NeedleShape,
    decode_tail,
    make_sample,
    score_answer,
)
from tidaldecode.eval.statistics import wilson
from tidaldecode.eval.store import Row


@dataclass(frozen=True)
class NeedleGrid:
    """Which questions are asked."""

    contexts: tuple[int, ...]
    """Lengths in tokens: context, question and answer together."""
    depths: tuple[float, ...]
    """Where the needle lies, from 0 (beginning) to 1 (end)."""
    samples: int
    """Questions per kind, context and depth."""
    distractors: int = 8
    """Other needles in the same context, where the kind has any."""
    kinds: tuple[str, ...] = ("multi-key",)
    """Some of `tidaldecode.eval.needle.KINDS`."""
    seed: int = 0
    decoded_tokens: int = 0
    """Last tokens of the context that are decoded too, before the question."""


@dataclass(frozen=True)
class NeedleTask:
    """Asks for needles. A row has ``kind, context, depth, exact, token_accuracy, step_ms``."""

    haystack: Haystack
    encode: Encode
    decode: Callable[[list[int]], str]
    grid: NeedleGrid

    def keys(self) -> list[str]:
        """``kind/context/depth/number`` of every question."""
        grid = self.grid
        return [
            f"{kind}/{context}/{depth}/{number}"
            for kind in grid.kinds
            for context in grid.contexts
            for depth in grid.depths
            for number in range(grid.samples)
        ]

    def build(self, key: str) -> NeedleSample:
        """The question of that name. Errors: `TidalError` when the haystack is too short."""
        kind, context, depth, number = key.split("/")
        sample = make_sample(
            self.haystack,
            self.encode,
            context_tokens=int(context),
            depth=float(depth),
            rng=random.Random(f"{self.grid.seed}/{context}/{depth}/{number}"),
            shape=NeedleShape.of_kind(kind, self.grid.distractors),
        )
        return decode_tail(sample, self.grid.decoded_tokens)

    def measure(
        self, engine: Engine, samples: dict[str, NeedleSample], methods: Sequence[Method]
    ) -> Iterator[list[Row]]:
        """Feed every question, let the method answer, compare."""
        scripts = [sample.script for sample in samples.values()]
        for method in methods:
            steps = list(engine.steps(scripts, method.config))
            step_ms = statistics.median(step.seconds for step in steps) * 1e3
            rows = []
            for index, (key, sample) in enumerate(samples.items()):
                told = [step.tokens[index] for step in steps]
                exact, accuracy = score_answer(sample, told, self.decode)
                kind, context, depth, _ = key.split("/")
                rows.append(
                    {
                        "key": key,
                        "method": method.name,
                        "kind": kind,
                        "context": int(context),
                        "depth": float(depth),
                        "exact": exact,
                        "token_accuracy": accuracy,
                        "step_ms": round(step_ms, 3),
                    }
                )
            yield rows


def summarise_needle(rows: Sequence[Row], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Exact match and token accuracy of every method, kind and context, with 95 % intervals."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for context in sorted({row["context"] for row in rows}):
            for method in methods:
                mine = [
                    row
                    for row in rows
                    if (row["method"], row["kind"], row["context"]) == (method.name, kind, context)
                ]
                exact = wilson(sum(row["exact"] for row in mine), len(mine))
                accuracy = wilson(sum(row["token_accuracy"] for row in mine), len(mine))
                lines.append(
                    {
                        "kind": kind,
                        "context": context,
                        "method": method.name,
                        "exact": vars(exact),
                        "token_accuracy": vars(accuracy),
                        "step_ms": statistics.median(row["step_ms"] for row in mine),
                    }
                )
    return lines
