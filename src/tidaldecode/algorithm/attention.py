"""decode_attention: the main path. What one layer does in one decode step (paper, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tidaldecode.algorithm.held import HeldSelections
from tidaldecode.algorithm.plan import LayerPlan, Role
from tidaldecode.config import TidalConfig
from tidaldecode.engine import OnScores
from tidaldecode.errors import TidalError
from tidaldecode.kernels import (
    ScoreKind,
    Selection,
    dense_decode,
    dense_output,
    dense_select,
    page_bound_scores,
    select_tokens,
    sparse_decode,
)
from tidaldecode.kernels.scratch import Scratch


@dataclass
class DecodeState:
    """What the layers of one decode step share; made anew for every forward pass."""

    config: TidalConfig
    seq_lens: torch.Tensor
    """``[B]`` int32: end of each row, the newest token included."""
    starts: torch.Tensor | None = None
    """``[B]`` int32: first valid position of each row (left padding), or None for 0."""
    block_table: torch.Tensor | None = None
    """``[B, max_blocks]`` int32 for a paged cache, or None."""
    whole_lens: torch.Tensor | None = field(default=None, init=False)
    """``[B]`` int32: length of a row that sparse layers attend to whole, 0 of any other; or None."""
    on_scores: OnScores | None = field(default=None, init=False)
    """Sees the scores of every selection layer, for those who study them."""
    selection: Selection | None = field(default=None, init=False)
    """The last selection of this step."""
    holds: HeldSelections | None = field(default=None, init=False)
    """Where the selections of this step are kept for steps after it."""
    follows: HeldSelections | None = field(default=None, init=False)
    """Selections of an earlier step, which every planned layer attends to instead of its own role."""
    scratch: Scratch = field(default_factory=Scratch, init=False)
    """What the kernels of this step share."""

    @classmethod
    def begin(
        cls,
        config: TidalConfig,
        plan: LayerPlan,
        seq_lens: torch.Tensor,
        starts: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        *,
        width: int | None = None,
        scratch: Scratch | None = None,
    ) -> DecodeState:
        """The state in which a step starts; a ``preselected`` plan starts with sinks and recents.

        ``width``: tokens that a row has at most; by default the host asks ``seq_lens``.
        """
        state = cls(config, seq_lens, starts, block_table)
        if scratch is not None:
            state.scratch = scratch
        if plan.preselected:
            if width is None:
                width = max(seq_lens.tolist(), default=0)
            state.select(torch.zeros(len(seq_lens), 1, width, device=seq_lens.device))
        return state

    def move_to(self, device: torch.device) -> None:
        """Follow a model that is split over devices: it may select on one and attend on another."""
        if self.seq_lens.device == device:
            return
        self.seq_lens = self.seq_lens.to(device)
        self.starts = None if self.starts is None else self.starts.to(device)
        self.block_table = None if self.block_table is None else self.block_table.to(device)
        self.whole_lens = None if self.whole_lens is None else self.whole_lens.to(device)
        self.selection = None if self.selection is None else self.selection.to(device)

    def select(self, scores: torch.Tensor) -> None:
        """Replace the selection by the best tokens of ``scores [B, R, W]``."""
        config = self.config
        self.selection = select_tokens(
            scores,
            self.seq_lens,
            budget=config.budget,
            sink_tokens=config.sink_tokens,
            recent_tokens=config.recent_tokens,
            starts=self.starts,
            backend=config.backend,
            scratch=self.scratch,
        )

    def hold(self, layer: int) -> None:
        """Keep the selection that ``layer`` has just made, where later steps want it."""
        if self.holds is not None and self.selection is not None:
            self.holds.hold(layer, self.selection, self.seq_lens)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    plan: LayerPlan,
    state: DecodeState,
    *,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one layer for one new token per sequence: ``out [B, Hq, D]``.

    ``q [B, Hq, D]``; ``k, v`` as in `tidaldecode.kernels`, the new token's included. ``out``: where the
    result goes, contiguous; new memory by default.

    Errors: `TidalError` for a layer that is not planned, a sparse layer with no selection in this
    step, and whatever breaks the kernel contract.
    """
    role, config = plan[layer], state.config
    state.move_to(q.device)
    if role is Role.HOST:
        raise TidalError(f"layer {layer}: expected a planned layer, got one that is the host's")
    if state.follows is not None:
        role, state.selection = Role.SPARSE, state.follows.at(layer).to(q.device)
    if role is Role.ESTIMATE:
        state.select(
            page_bound_scores(
                q,
                k,
                v,
                state.seq_lens,
                scale=scale,
                page_tokens=config.page_tokens,
                starts=state.starts,
                block_table=state.block_table,
                backend=config.backend,
            )
        )
    if role in (Role.SPARSE, Role.ESTIMATE):
        if state.selection is None:
            raise TidalError(
                f"layer {layer}: expected a selection made earlier in this step, found none; "
                f"run the layers in order (plan {plan})"
            )
        found, _ = sparse_decode(
            q,
            k,
            v,
            state.selection,
            scale=scale,
            block_table=state.block_table,
            whole_lens=state.whole_lens,
            out=out,
            backend=config.backend,
        )
        return found
    if role is Role.SELECT and state.on_scores is None:
        found, _, state.selection = dense_select(
            q,
            k,
            v,
            state.seq_lens,
            scale=scale,
            scores=score_kind(config),
            budget=config.budget,
            sink_tokens=config.sink_tokens,
            recent_tokens=config.recent_tokens,
            starts=state.starts,
            block_table=state.block_table,
            backend=config.backend,
            scratch=state.scratch,
        )
        state.hold(layer)
        return found if out is None else out.copy_(found)
    if role is Role.DENSE:
        found = dense_output(
            q,
            k,
            v,
            state.seq_lens,
            scale=scale,
            starts=state.starts,
            block_table=state.block_table,
            backend=config.backend,
        )
        return found if out is None else out.copy_(found)
    found, _, scores = dense_decode(
        q,
        k,
        v,
        state.seq_lens,
        scale=scale,
        starts=state.starts,
        block_table=state.block_table,
        scores=score_kind(config),
        backend=config.backend,
    )
    assert scores is not None and state.on_scores is not None
    state.on_scores(layer, scores)
    state.select(scores)
    state.hold(layer)
    return found if out is None else out.copy_(found)


def score_kind(config: TidalConfig) -> ScoreKind:
    """The scores that `dense_decode` must emit for this configuration."""
    return "query_head_logits" if config.score == "logits" else config.granularity
