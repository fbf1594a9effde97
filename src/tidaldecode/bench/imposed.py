"""Times rounds of lossless decoding on random keys and values, for an acceptance that is imposed.

Random weights agree with nothing, so the acceptance is an assumption here and its tokens a calculation;
what a round costs is measured: drafts, verification and host, with real selections.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tidaldecode.bench.decode import fill_cache, step_times
from tidaldecode.bench.timing import now, summarise
from tidaldecode.config import TidalConfig
from tidaldecode.integrations.transformers import enable
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP = 2
"""Rounds before those that are timed."""


@dataclass(frozen=True)
class RoundTime:
    """One draft length at one context and batch size."""

    context: int
    batch: int
    budget: int
    plan: str
    draft_tokens: int
    full_ms: float
    """A step of full attention."""
    low_full_ms: float
    high_full_ms: float
    round_ms: float
    """A whole round."""
    low_round_ms: float
    high_round_ms: float
    draft_ms: float
    """One drafted token."""
    verify_ms: float

    def tokens(self, acceptance: float) -> float:
        """Tokens a round and row where a draft is kept with this chance (arXiv 2211.17192, eq. 1)."""
        return sum(acceptance**index for index in range(self.draft_tokens + 1))

    def speedup(self, acceptance: float) -> float:
        """Against full attention, per token."""
        return self.full_ms * self.tokens(acceptance) / self.round_ms


@torch.inference_mode()
def time_rounds(
    model: PreTrainedModel,
    config: TidalConfig,
    lengths: Sequence[int],
    *,
    sizes: Sequence[tuple[int, int]],
    rounds: int,
) -> Iterator[RoundTime]:
    """Time ``rounds`` rounds with drafts of each of ``lengths`` at every ``(cached tokens, rows)``.

    Errors: `TidalError` for settings that the model cannot run, and too little memory.
    """
    with enable(model, config) as handle:
        for context, batch in sizes:
            longest = config.replace(draft_tokens=max(lengths))
            room = CapturedRounds.room(longest)
            capacity = context + (_WARM_UP + rounds + 1) * (max(lengths) + 1) + 2 * room
            full = dense_plan(handle.plan)
            dense = DecodeStep(model, handle.config, full, batch=batch, capacity=capacity)
            fill_cache(dense)
            dense.resume(context)
            full_time = summarise(step_times(dense, rounds))
            steps = CapturedRounds(model, longest, handle.plan, batch=batch, capacity=capacity)
            steps.draft.use_cache(dense.cache)
            for length in lengths:
                steps.draft.resume(context)
                steps.begin(dense.tokens, context + 1, capacity - room)
                whole, drafts, verifies = _time_rounds(steps, length, rounds)
                taken = summarise(whole)
                yield RoundTime(
                    context=context,
                    batch=batch,
                    budget=config.budget,
                    plan=str(handle.plan),
                    draft_tokens=length,
                    full_ms=full_time.median_ms,
                    low_full_ms=full_time.low_ms,
                    high_full_ms=full_time.high_ms,
                    round_ms=taken.median_ms,
                    low_round_ms=taken.low_ms,
                    high_round_ms=taken.high_ms,
                    draft_ms=summarise(drafts).median_ms / length,
                    verify_ms=summarise(verifies).median_ms,
                )
            steps.close()
            dense.close()


def _time_rounds(
    steps: CapturedRounds, length: int, count: int
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of whole rounds, of their drafts and of their verifications; one runs ahead."""
    steps.prepare(length)
    whole, drafts, verifies = [], [], []
    before = now(steps.ends.known.device)
    pending = steps.launch(length)
    for index in range(_WARM_UP + count):
        current, pending = pending, steps.launch(length)
        current.read()
        after = time.perf_counter()
        if index >= _WARM_UP:
            draft, verify = current.seconds()
            whole.append(1e3 * (after - before))
            drafts.append(1e3 * draft)
            verifies.append(1e3 * verify)
        before = after
    pending.read()
    return whole, drafts, verifies
