"""Rounds of lossless decoding that need nothing of the host: captured drafts, and a captured verdict.

A round replays the sparse step for every drafted token and a dense step once. Greedy tokens are chosen
within these graphs, all others behind them, by a `RoundChoice`. Lengths, tokens and the acceptance stay
on the device, so the next round can be asked for before the host has seen the last one; it looks once,
when it reads a round's verdict. On a CPU the same steps run one by one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tidaldecode.algorithm import HeldSelections, LayerPlan
from tidaldecode.algorithm.draft_length import longest_draft
from tidaldecode.config import TidalConfig
from tidaldecode.errors import ShortOfMemoryError, TidalError
from tidaldecode.integrations.transformers.decode_step import DecodeStep
from tidaldecode.integrations.transformers.follow_step import FollowStep
from tidaldecode.integrations.transformers.footprint import kv_reads
from tidaldecode.integrations.transformers.round_choice import RoundChoice
from tidaldecode.integrations.transformers.row_ends import RowEnds
from tidaldecode.integrations.transformers.score_step import ScoreStep
from tidaldecode.integrations.transformers.verify_step import VerifyStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mark = torch.cuda.Event | float
"""A moment: on the device's own clock, or in seconds."""


@dataclass(frozen=True)
class Round:
    """A round that was asked for, and may still be running."""

    length: int
    """Drafted tokens of every row."""
    verdict: torch.Tensor
    """``[B, length + 2]`` int64 on the host: as a `ScoreStep` leaves it; void before the end."""
    begin: Mark
    middle: Mark
    """Between the draft and the verification."""
    end: Mark

    def read(self) -> tuple[list[list[int]], list[int]]:
        """Tokens of every row, and how many of them it may take; waits for the round.

        This is the one place where the host waits for the device.
        """
        if isinstance(self.end, torch.cuda.Event):
            self.end.synchronize()
        table = self.verdict.tolist()
        return [row[:-1] for row in table], [row[-1] for row in table]

    def seconds(self) -> tuple[float, float]:
        """What the draft and the verification took, once the round is done."""
        return _between(self.begin, self.middle), _between(self.middle, self.end)


class CapturedRounds:
    """Drafts and verifies on one cache of fixed addresses, for ``batch`` rows.

    Args:
        model: an enabled model; its attention function must be ours.
        config, plan: how drafts are decoded.
        capacity: tokens that the cache of a row holds, `room` for a draft behind its limit included.

    Errors: `TidalError` as a `DecodeStep` has them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TidalConfig,
        plan: LayerPlan,
        *,
        batch: int,
        capacity: int,
    ) -> None:
        self.model, self.config, self.plan = model, config, plan
        self.batch, self.capacity = batch, capacity
        self.reads = kv_reads(model, config, plan)
        """Bytes that a draft reads, and full attention."""
        self.draft = DecodeStep(model, config, plan, batch=batch, capacity=capacity)
        """The step of a draft's first token, or of all its tokens."""
        self._held: HeldSelections | None = None
        self._follow: FollowStep | None = None
        if HeldSelections.wanted(config, plan):
            self._held = HeldSelections(plan, longest_draft(config.draft_tokens))
            self.draft.hold_selections(self._held)
        self.ends = RowEnds.make(batch, model.device)
        self._verify: dict[tuple[type[ScoreStep], int], ScoreStep] = {}
        self._choice: RoundChoice | None = None

    @staticmethod
    def room(config: TidalConfig) -> int:
        """Columns that a draft may need behind the limit of its row."""
        return longest_draft(config.draft_tokens) + 1

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`DecodeStep.prefill`; `begin` has to follow."""
        return self.draft.prefill(ids, mask)

    @torch.inference_mode()
    def begin(
        self, newest: torch.Tensor, known: int, limit: int, choice: RoundChoice | None = None
    ) -> None:
        """Start, or start again, from prefilled rows of ``known - 1`` columns and ``newest [B, 1]``.

        Args:
            limit: columns up to which tokens are wanted.
            choice: how tokens are chosen; by default the likeliest.

        Errors: `TidalError` where drafts behind the limit would not fit.
        """
        if limit + self.room(self.config) > self.capacity:
            raise TidalError(
                f"limit: expected at most {self.capacity - self.room(self.config):,} tokens in a cache "
                f"of {self.capacity:,}, which also holds a draft, got {limit:,}"
            )
        self.ends.known.fill_(known)
        self.ends.newest.copy_(newest)
        self.ends.limit.fill_(limit)
        self._choice = choice
        if choice is not None:
            # A row at its limit rests, but the places behind it are still looked up.
            choice.reserve(limit + self.room(self.config))
        for verify in self._verify.values():
            verify.starts.copy_(self.draft.starts)

    @torch.inference_mode()
    def rest(self, ended: Sequence[bool]) -> None:
        """Let rows that have ended rest from the next round on; the host does not wait."""
        device = self.ends.known.device
        rows = torch.tensor(ended, pin_memory=device.type == "cuda")
        self.ends.rest(rows.to(device, non_blocking=True))

    @torch.inference_mode()
    def launch(self, length: int) -> Round:
        """Ask for a round with drafts of ``length`` tokens, 0 for a step of full attention.

        Errors: `TidalError` for a model that cannot be captured, and when memory is short.
        """
        verify = self.prepare(length)
        begin = self._mark()
        verify.tokens[:, :1].copy_(self.ends.newest)
        drafted = verify.tokens[:, 1:]
        chances = self.fill_draft(drafted)
        middle = self._mark()
        verify.replay()
        if self._choice is not None:
            assert verify.logits is not None
            verify.settle(self._choice.judge(drafted, chances, verify.logits))
        pinned = verify.verdict.is_cuda
        verdict = torch.empty(verify.verdict.shape, dtype=torch.int64, pin_memory=pinned)
        verdict.copy_(verify.verdict, non_blocking=pinned)
        return Round(length, verdict, begin, middle, self._mark())

    @torch.inference_mode()
    def prepare(self, length: int) -> ScoreStep:
        """Capture what a round with drafts of ``length`` tokens needs, and stand where it begins.

        It may take a minute where steps are compiled first, which no clock of a round should see.

        Errors: `TidalError` as `launch`; when memory is short, all of the rounds' is given back.
        """
        try:
            return self._prepare(length)
        except ShortOfMemoryError:
            self.close()
            raise

    def _prepare(self, length: int) -> ScoreStep:
        verify = self.verifier(length)
        verify.prepare()
        if length:
            self._stand()
            self.draft.prepare()
        if length > 1 and self._held is not None:
            self._prepare_follow(self._held)
        return verify

    def _prepare_follow(self, held: HeldSelections) -> None:
        """Capture the step of later tokens, which needs one to follow; the rows stay where they are."""
        if self._follow is None or self._follow.cache is not self.draft.cache:
            self.draft.replay()
            self._follow = FollowStep(self.draft, held)
            self._follow.prepare()
            self._stand()

    def _stand(self) -> None:
        """Begin a draft after the newest tokens; rows that rest have none."""
        self.draft.place(self.ends.newest, self.ends.lengths(self.draft.starts))

    def fill_draft(self, drafted: torch.Tensor) -> list[torch.Tensor | None]:
        """Draft the tokens after the newest ones, where `draft` stands, into ``drafted [B, length]``.

        Returns what a `Chooser` gives beside each of them.
        """
        given: list[torch.Tensor | None] = []
        for index in range(drafted.shape[1]):
            step = self.draft if index == 0 or self._follow is None else self._follow
            step.replay()
            if self._choice is not None:
                assert step.logits is not None
                token, chances = self._choice.draft(step.logits, index)
                step.tokens.copy_(token)
                given.append(chances)
            drafted[:, index].copy_(step.tokens[:, 0])
        return given

    def verifier(self, length: int) -> ScoreStep:
        """The step for the verification of ``length`` drafts; made when it is first asked for."""
        kind = VerifyStep if self._choice is None else ScoreStep
        found = self._verify.get((kind, length))
        if found is None:
            found = kind(
                self.model,
                self.config,
                self.plan,
                self.ends,
                length=length,
                batch=self.batch,
                capacity=self.capacity,
            )
            found.use_cache(self.draft.cache)
            found.starts.copy_(self.draft.starts)
            self._verify[kind, length] = found
        return found

    def close(self) -> None:
        """Give the memory of the graphs and the cache back."""
        for verify in self._verify.values():
            verify.close()
        self._verify.clear()
        if self._follow is not None:
            self._follow.close()
            self._follow = None
        self.draft.close()

    def _mark(self) -> Mark:
        if not self.ends.known.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between(first: Mark, second: Mark) -> float:
    """Seconds from one moment to the next."""
    if isinstance(first, torch.cuda.Event):
        assert isinstance(second, torch.cuda.Event)
        return float(first.elapsed_time(second)) / 1e3
    assert isinstance(second, float)
    return second - first
