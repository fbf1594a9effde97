"""Agreement: how often a method's likeliest token is full attention's, and how far its logits are off.

Full attention decodes greedily; every method is then fed those same tokens, so that one difference
does not spoil the comparison of all that follows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tidaldecode.engine import Engine, Script
from tidaldecode.eval.methods import DENSE, Method
from tidaldecode.eval.passages import Passage, PassageSet
from tidaldecode.eval.statistics import mean_interval
from tidaldecode.eval.store import Row


@dataclass(frozen=True)
class AgreementTask:
    """Compares with full attention. A row has ``equal`` (0 or 1) and ``kl`` (nats) by position."""

    passages: PassageSet

    def keys(self) -> list[str]:
        """Names of all passages."""
        return self.passages.keys()

    def build(self, key: str) -> Passage:
        """The passage of that name."""
        return self.passages.build(key)

    def measure(
        self, engine: Engine, samples: dict[str, Passage], methods: Sequence[Method]
    ) -> Iterator[list[Row]]:
        """Decode greedily with full attention, then follow it by every method."""
        count = self.passages.new_tokens
        free: list[Script] = [
            [sample.decoded_ids[0], *[None] * (count - 1)] for sample in samples.values()
        ]
        full = list(engine.steps(free, None))
        forced = [
            [script[0], *(step.tokens[index] for step in full[:-1])]
            for index, script in enumerate(free)
        ]
        for method in methods:
            if method.config is None:
                yield [
                    {"key": key, "method": DENSE, "equal": [1] * count, "kl": [0.0] * count}
                    for key in samples
                ]
                continue
            equal: list[list[int]] = [[] for _ in samples]
            divergence: list[list[float]] = [[] for _ in samples]
            for reference, step in zip(full, engine.steps(forced, method.config), strict=True):
                kl = kl_nats(reference.logits, step.logits)
                for index, value in enumerate(kl):
                    equal[index].append(int(step.tokens[index] == reference.tokens[index]))
                    divergence[index].append(round(value, 6))
            yield [
                {"key": key, "method": method.name, "equal": equal[index], "kl": divergence[index]}
                for index, key in enumerate(samples)
            ]


def kl_nats(full: torch.Tensor, other: torch.Tensor) -> list[float]:
    """KL(full || other) of every row, in nats; both are logits ``[B, vocabulary]`` fp32."""
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    # A difference of rounding errors can fall below zero, a divergence cannot.
    values: list[float] = terms.sum(-1).clamp(min=0).tolist()
    return values


def summarise_agreement(rows: Sequence[Row], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Equal tokens and KL of every method, with 95 % intervals over passages, and by position."""
    lines = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method.name]
        lines.append(
            {
                "method": method.name,
                "equal": vars(mean_interval([statistics.fmean(row["equal"]) for row in mine])),
                "kl_nats": vars(mean_interval([statistics.fmean(row["kl"]) for row in mine])),
                "equal_by_position": [
                    statistics.fmean(values)
                    for values in zip(*(row["equal"] for row in mine), strict=True)
                ],
                "kl_by_position": [
                    statistics.fmean(values)
                    for values in zip(*(row["kl"] for row in mine), strict=True)
                ],
            }
        )
    return lines
