"""What both loops of lossless decoding ask of their rows: can a draft pay, and what did a round do?"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tidaldecode.algorithm.cost import KVReads
from tidaldecode.algorithm.tally import Tally
from tidaldecode.integrations.transformers.ragged_rows import RaggedRows


class RoundTally:
    """Counts the rounds of one call of ``generate``.

    Args:
        reads: what drafts and full attention read.
        starts: first valid column of every row.
    """

    def __init__(self, reads: KVReads, rows: RaggedRows, starts: Sequence[int]) -> None:
        self.tally = Tally()
        self._rows, self._starts, self._budget = rows, starts, reads.config.budget
        # Rows of a batch and rounds after each other ask for the same few hundred contexts.
        self._drafted_bytes = functools.cache(reads.draft)
        self._full_bytes = functools.cache(reads.full)

    def fits(self, length: int) -> bool:
        """Whether drafts of ``length`` tokens would stay within the budget, and so be full attention."""
        widest = max(
            known + length - 1 - start
            for known, start in zip(self._rows.lengths, self._starts, strict=True)
        )
        return widest <= self._budget

    def running(self) -> list[int]:
        """Rows that go on."""
        rows = self._rows
        return [
            row
            for row, (known, ended) in enumerate(zip(rows.lengths, rows.ended, strict=True))
            if known < rows.capacity and not ended
        ]

    def add(
        self,
        length: int,
        running: Sequence[int],
        known: Sequence[int],
        taken: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        """Add a round of drafts of ``length`` tokens.

        ``running``: the rows that count; ``known, taken`` of all rows: tokens before the round, and from
        it; ``accepted`` of the running ones.
        """
        tally = self.tally
        tally.rounds += 1
        tally.verified += len(running)
        # No draft is wanted for a row's last token, and none behind it.
        wanted = [min(length, self._rows.capacity - known[row] - 1) for row in running]
        tally.drafted += sum(wanted)
        tally.accepted += sum(map(min, accepted, wanted))
        tally.tokens += sum(taken[row] for row in running)
        for row in running:
            context = known[row] - self._starts[row]
            tally.kv_bytes += sum(
                self._drafted_bytes(context + index, index) for index in range(length)
            )
            tally.kv_bytes += self._full_bytes(context + length)
            tally.dense_kv_bytes += sum(
                self._full_bytes(context + index) for index in range(taken[row])
            )
