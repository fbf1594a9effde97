"""Captured lossless rounds against our own dense step, token for token, and that step against itself.

In half precision two logits may tie within rounding, and texts then part although nothing is wrong. How
often that happens is measured on full attention alone: the same step once more, with rows cut into
another number of parts, rounds its sums in another order.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tidaldecode.algorithm import LayerPlan
from tidaldecode.algorithm.parting import differences
from tidaldecode.algorithm.tally import Tally
from tidaldecode.config import TidalConfig
from tidaldecode.integrations.transformers import enable
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.lossless_graph import RoundLoop, plain_rows
from tidaldecode.integrations.transformers.step_text import greedy_text, watched_text
from tidaldecode.kernels.partition import other_partition
from tidaldecode.proof.equality import Draft, left_padded
from tidaldecode.proof.rounds import RandomRounds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ITSELF = "full attention, other splits"
"""Names the rows that compare full attention with itself."""


class CapturedProof:
    """All steps of a comparison on one cache; they serve every batch of ``batch`` rows.

    Args:
        model: an enabled model.
        drafts: ways to draft.
        config: the settings that they change.
        capacity: tokens that a row has at most, new ones included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafts: Sequence[Draft],
        config: TidalConfig,
        plan: LayerPlan,
        *,
        batch: int,
        capacity: int,
    ) -> None:
        settings = {"batch": batch, "capacity": capacity + _room(drafts, config)}
        self.model = model
        full = dense_plan(plan)
        self.dense = DecodeStep(model, config, full, **settings)
        self.again = DecodeStep(model, config, full, **settings)
        self.rounds: dict[Draft, CapturedRounds] = {}
        for draft in drafts:
            kind = RandomRounds if draft.random else CapturedRounds
            self.rounds[draft] = kind(model, draft.settings(config), plan, **settings)

    @torch.inference_mode()
    def compare(self, prompts: Sequence[Sequence[int]], count: int) -> Iterator[dict[str, Any]]:
        """Rows as `tidaldecode.proof.equality.compare_batch` gives them, the first against itself."""
        ids, mask = left_padded(prompts, self.model.device)
        length = ids.shape[1]
        first = self.dense.prefill(ids, mask)
        starts = self.dense.starts.clone()
        newest = first.argmax(-1, keepdim=True)

        def again(step: DecodeStep) -> None:
            if step.cache is not self.dense.cache:
                step.use_cache(self.dense.cache)
            step.resume(length, starts)

        wanted, gaps = watched_text(self.dense, first, count)
        again(self.dense)
        _, dense_seconds = _timed(lambda: greedy_text(self.dense, newest, count))
        again(self.again)
        with other_partition():
            self.again.prepare()
            found, seconds = _timed(lambda: greedy_text(self.again, newest, count))
        common = {"prompts": len(prompts), "dense_seconds": dense_seconds}
        yield _row(ITSELF, wanted, found, gaps, Tally(), seconds, common)
        for draft, rounds in self.rounds.items():
            again(rounds.draft)
            rows = plain_rows(ids, length + count)
            loop = RoundLoop(rows, rounds)
            rounds.begin(newest, length + 1, length + count)
            rounds.prepare(loop.length.choose())
            _, seconds = _timed(functools.partial(_exhaust, loop, newest))
            found = rows.sequences()[:, length:].to(wanted.device)
            yield _row(draft.name, wanted, found, gaps, loop.counts.tally, seconds, common)


def compare_captured(
    model: PreTrainedModel,
    batches: Sequence[Sequence[Sequence[int]]],
    drafts: Sequence[Draft],
    config: TidalConfig,
    *,
    new_tokens: int,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of every batch of prompts; steps are made once for each batch size."""
    longest = max(len(prompt) for batch in batches for prompt in batch)
    proofs: dict[int, CapturedProof] = {}
    with enable(model, config) as handle:
        for batch in batches:
            if len(batch) not in proofs:
                proofs[len(batch)] = CapturedProof(
                    model,
                    drafts,
                    handle.config,
                    handle.plan,
                    batch=len(batch),
                    capacity=longest + new_tokens,
                )
            yield list(proofs[len(batch)].compare(batch, new_tokens))


def _exhaust(loop: RoundLoop, newest: torch.Tensor) -> None:
    for _ in loop.run(newest):
        pass


def _room(drafts: Sequence[Draft], config: TidalConfig) -> int:
    return max((CapturedRounds.room(draft.settings(config)) for draft in drafts), default=0)


def _row(
    name: str,
    wanted: torch.Tensor,
    found: torch.Tensor,
    gaps: torch.Tensor,
    tally: Tally,
    seconds: float,
    common: dict[str, Any],
) -> dict[str, Any]:
    parted = differences(wanted, found, gaps)
    equal = common["prompts"] - len(parted)
    return {
        "draft": name,
        "equal": equal,
        "differences": parted,
        **vars(tally),
        "seconds": seconds,
        **common,
    }


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its seconds until the device is done."""
    begin = time.perf_counter()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - begin
