"""select_tokens: token scores -> the positions that sparse layers will read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidaldecode.errors import check_tensor
from tidaldecode.kernels.contract import check_budget, check_rows, row_ranges
from tidaldecode.kernels.dispatch import resolve_backend
from tidaldecode.kernels.scratch import Scratch


@dataclass(frozen=True)
class Selection:
    """Selected tokens of every sequence; it lives for one forward pass."""

    positions: torch.Tensor
    """``[B, R, N]`` int32: logical positions, ascending, padded with -1."""
    counts: torch.Tensor
    """``[B, R]`` int32: how many of them are real."""

    def to(self, device: torch.device) -> Selection:
        """The same selection on ``device``; itself if it is there already."""
        if self.positions.device == device:
            return self
        return Selection(self.positions.to(device), self.counts.to(device))


def select_tokens(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    budget: int,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    starts: torch.Tensor | None = None,
    backend: str = "auto",
    scratch: Scratch | None = None,
) -> Selection:
    """The ``budget`` best tokens of every set, sinks, recents and the newest token always among them.

    The first ``sink_tokens`` positions of a row, its newest position and the ``recent_tokens`` before
    that are taken first; the rest go to the highest scores. Tie rule: of equal scores the lower
    position wins; NaN ranks lowest, with -inf. A row of at most ``budget`` tokens is selected whole.

    Args:
        scores: ``[B, R, W]`` fp32, W >= max(seq_lens); values outside a row's range are ignored.
        seq_lens: ``[B]`` int32, end of each row; ``starts [B]`` int32 or None, its beginning.
        budget: tokens per set, N; at least ``sink_tokens + recent_tokens + 1``.
        scratch: memory that calls of one stream may share.

    Errors: `TidalError` naming the argument that breaks the contract.
    """
    check_tensor("scores", scores, (None,) * 3, dtypes=(torch.float32,), device=scores.device)
    batch, _, width = scores.shape
    check_rows(seq_lens, starts, batch, scores.device)
    check_budget(budget, sink_tokens, recent_tokens)
    if resolve_backend(backend, scores.device) == "triton":
        from tidaldecode.kernels.triton import select_tokens as twin

        return twin.select_tokens(
            scores,
            seq_lens,
            budget=budget,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            starts=starts,
            scratch=scratch or Scratch(),
        )
    ranges = row_ranges(seq_lens, starts, batch, width)
    lowest = torch.finfo(scores.dtype).min
    ranked = scores.detach().nan_to_num(nan=lowest, neginf=lowest)
    for row, (start, end) in zip(ranked, ranges, strict=True):
        row[:, start : start + sink_tokens] = torch.inf
        row[:, max(start, end - 1 - recent_tokens) : end] = torch.inf
        row[:, :start] = row[:, end:] = -torch.inf
    kept = _keep_best(ranked, min(budget, width))
    for row, (start, end) in zip(kept, ranges, strict=True):
        row[:, :start] = row[:, end:] = False
    return _compact(kept, budget)


def _keep_best(ranked: torch.Tensor, budget: int) -> torch.Tensor:
    """Exactly ``budget`` tokens per set ``[B, R, W]``: all above the threshold, then the first ties."""
    if budget == 0:
        return torch.zeros_like(ranked, dtype=torch.bool)
    threshold = ranked.topk(budget, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = ranked > threshold
    ties = ranked == threshold
    room = budget - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


def _compact(kept: torch.Tensor, budget: int) -> Selection:
    """Turn a mask ``[B, R, W]`` into ascending positions; what is not kept lands in a spare slot."""
    counts = kept.sum(-1, dtype=torch.int32)
    slots = torch.where(kept, kept.cumsum(-1) - 1, budget)
    padded = torch.full((*kept.shape[:2], budget + 1), -1, dtype=torch.int32, device=kept.device)
    source = torch.arange(kept.shape[-1], dtype=torch.int32, device=kept.device).expand(kept.shape)
    padded.scatter_(-1, slots, source)
    return Selection(padded[..., :budget], counts)
