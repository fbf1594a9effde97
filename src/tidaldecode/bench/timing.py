"""Wall-clock timing of several candidates in one run: interleaved, so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Repetitions of one candidate, milliseconds."""

    median_ms: float
    low_ms: float
    """10th percentile."""
    high_ms: float
    """90th percentile."""


def time_interleaved(
    candidates: dict[str, Callable[[int], object]],
    *,
    repetitions: int,
    warmup: int = 3,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every candidate once a round, for ``repetitions`` rounds after ``warmup`` untimed ones.

    A candidate is called with the number of the round, so that it can rotate through buffers larger
    than the processor's cache.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warmup + repetitions):
        for name, candidate in candidates.items():
            begin = time.perf_counter()
            candidate(index)
            elapsed = time.perf_counter() - begin
            if index >= warmup:
                samples[name].append(1e3 * elapsed)
        on_round()
    return {name: summarise(values) for name, values in samples.items()}


def summarise(values: Sequence[float]) -> Timing:
    """Median and percentiles of repetitions in milliseconds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    )


def now(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
