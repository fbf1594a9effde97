"""Decode-path perplexity: the loss of a text fed token by token after a dense prefill.

A prefill's perplexity would never meet the method; here every prediction does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tidaldecode.engine import Engine
from tidaldecode.eval.methods import DENSE, Method
from tidaldecode.eval.passages import Passage, PassageSet
from tidaldecode.eval.statistics import mean_interval
from tidaldecode.eval.store import Row

DRIFT_BINS = 8
"""Equal parts of the decoded length, over which drift is shown."""


@dataclass(frozen=True)
class PerplexityTask:
    """Measures the loss of passages. A row has ``nll``, nats of every token, ``step_ms, mean_ms``."""

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
        """Feed every passage by every method."""
        rows = torch.tensor([sample.decoded_ids for sample in samples.values()])
        scripts = rows[:, :-1].tolist()
        for method in methods:
            losses, seconds = [], []
            for index, step in enumerate(engine.steps(scripts, method.config)):
                targets = rows[:, index + 1].to(step.logits.device)
                loss = torch.nn.functional.cross_entropy(step.logits, targets, reduction="none")
                losses.append(loss.cpu())
                seconds.append(step.seconds)
            nll = torch.stack(losses, dim=1).tolist()
            yield [
                {
                    "key": key,
                    "method": method.name,
                    "nll": [round(value, 5) for value in values],
                    "step_ms": round(statistics.median(seconds) * 1e3, 3),
                    # Corrections are a few long steps, which a median does not show.
                    "mean_ms": round(statistics.fmean(seconds) * 1e3, 3),
                }
                for key, values in zip(samples, nll, strict=True)
            ]


def summarise_perplexity(rows: Sequence[Row], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Loss of every method with 95 % intervals over passages, in nats a token.

    Where full attention was run too: the difference to it, passage by passage, in percent of its
    loss, and the difference in each of `DRIFT_BINS` parts of the decoded length.
    """
    full = {row["key"]: row["nll"] for row in rows if row["method"] == DENSE}
    lines = []
    for method in methods:
        mine = {row["key"]: row["nll"] for row in rows if row["method"] == method.name}
        means = [statistics.fmean(nll) for nll in mine.values()]
        line: dict[str, Any] = {
            "method": method.name,
            "nll": vars(mean_interval(means)),
            "perplexity": math.exp(statistics.fmean(means)),
            **{
                name: statistics.median(row[name] for row in rows if row["method"] == method.name)
                for name in ("step_ms", "mean_ms")
            },
        }
        if set(mine) <= set(full):
            base = statistics.fmean(statistics.fmean(full[key]) for key in mine)
            extra = [
                statistics.fmean(nll) - statistics.fmean(full[key]) for key, nll in mine.items()
            ]
            line["extra_percent"] = vars(mean_interval([100 * value / base for value in extra]))
            line["drift_nats"] = _drift(mine, full)
        lines.append(line)
    return lines


def _drift(mine: dict[str, list[float]], full: dict[str, list[float]]) -> list[float]:
    """Mean extra loss in each part of the decoded length, nats a token."""
    length = len(next(iter(mine.values())))
    bins = min(DRIFT_BINS, length)
    edges = [length * index // bins for index in range(bins + 1)]
    return [
        statistics.fmean(
            value - reference
            for key, nll in mine.items()
            for value, reference in zip(nll[start:end], full[key][start:end], strict=True)
        )
        for start, end in pairwise(edges)
    ]
