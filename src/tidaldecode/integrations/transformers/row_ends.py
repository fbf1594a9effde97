"""Where the rows of a batch end, on the device: what a round of lossless decoding moves on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowEnds:
    """Where the rows of a batch end; on the device, and moved on by every verification."""

    known: torch.Tensor
    """``[B]`` int32: columns up to the newest token, which is not cached yet."""
    newest: torch.Tensor
    """``[B, 1]`` int64: that token."""
    limit: torch.Tensor
    """``[B]`` int32: no row goes beyond its own; one that is there rests."""

    @classmethod
    def make(cls, batch: int, device: torch.device) -> RowEnds:
        """Rows of nothing but a newest token."""
        return cls(
            torch.ones(batch, dtype=torch.int32, device=device),
            torch.zeros(batch, 1, dtype=torch.int64, device=device),
            torch.ones(batch, dtype=torch.int32, device=device),
        )

    def lengths(self, starts: torch.Tensor, more: int = 0) -> torch.Tensor:
        """``[B]`` int32: ends of rows with ``more`` columns after their newest token's.

        A row that rests has no token, from its ``starts [B]`` on: it costs a step nothing.
        """
        return torch.where(self.known < self.limit, self.known + more, starts)

    def rest(self, rows: torch.Tensor) -> None:
        """Let ``rows [B]``, booleans on the device, rest where they are."""
        self.limit.masked_fill_(rows, 0)

    def advance(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Give every row the first ``counts [B]`` of ``tokens [B, T]``, as far as the limit lets it."""
        taken = torch.minimum(counts.int(), (self.limit - self.known).clamp(min=0))
        last = tokens.gather(1, (taken.long()[:, None] - 1).clamp(min=0))
        self.newest.copy_(torch.where(taken[:, None] > 0, last, self.newest))
        self.known.add_(taken)
