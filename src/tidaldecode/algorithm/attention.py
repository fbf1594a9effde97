"""decode_attention: the main path. What one layer does in one decode step (paper, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tidaldecode.algorithm.plan import LayerPlan, Role
from tidaldecode.config import TidalConfig
from tidaldecode.engine import OnScores
from tidaldecode.errors import TidalError
from tidaldecode.kernels import (
    ScoreKind,
    Selection,
    dense_decode,
    page_bound_scores,
    select_tokens,
    sparse_decode,
)


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
    on_scores: OnScores | None = field(default=None, init=False)
    """Sees the scores of every selection layer, for those who study them."""
    kv_heads: int = field(default=0, init=False)
    memory: dict[int, tuple[int, Selection]] | None = field(default=None, init=False)
    """Age in steps and selection of every selection layer, where they outlive a step."""
    selection: Selection | None = field(default=None, init=False)
    """The last selection of this step."""

    @classmethod
    def begin(
        cls,
        config: TidalConfig,
        plan: LayerPlan,
        seq_lens: torch.Tensor,
        starts: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
    ) -> DecodeState:
        """The state in which a step starts; a ``preselected`` plan starts with sinks and recents."""
        state = cls(config, seq_lens, starts, block_table)
        if plan.preselected:
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
        self.selection = None if self.selection is None else self.selection.to(device)

    def select(self, scores: torch.Tensor) -> None:
        """Replace the selection by the best tokens of ``scores [B, R, W]``."""
        config = self.config
        scores = pool_scores(scores, config, self.kv_heads)
        self.selection = select_tokens(
            scores,
            self.seq_lens,
            budget=config.budget,
            sink_tokens=config.sink_tokens,
            recent_tokens=config.recent_tokens,
            starts=self.starts,
            mass=config.mass,
            backend=config.backend,
        )

    def reuse(self, layer: int) -> bool:
        """Take up the layer's last selection, with the newest token added, if it is recent enough."""
        memory, every = self.memory, self.config.select_every
        if every == 1 or memory is None or layer not in memory:
            return False
        age, selection = memory[layer]
        if age + 1 == every:
            return False
        newest = (self.seq_lens - 1)[:, None, None].expand(-1, selection.positions.shape[1], 1)
        self.selection = Selection(
            torch.cat([selection.positions, newest], dim=-1), selection.counts + 1
        )
        memory[layer] = (age + 1, self.selection)
        return True


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    plan: LayerPlan,
    state: DecodeState,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of one layer for one new token per sequence: ``out [B, Hq, D]``.

    ``q [B, Hq, D]``; ``k, v`` as in `tidaldecode.kernels`, the new token's included.

    Errors: `TidalError` for a layer that is not planned, a sparse layer with no selection in this
    step, and whatever breaks the kernel contract.
    """
    role, config = plan[layer], state.config
    state.move_to(q.device)
    if role is Role.HOST:
        raise TidalError(f"layer {layer}: expected a planned layer, got one that is the host's")
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
    state.kv_heads = k.shape[1] if state.block_table is None else k.shape[2]
    if role is Role.SELECT and state.reuse(layer):
        role = Role.SPARSE
    if role in (Role.SPARSE, Role.ESTIMATE):
        if state.selection is None:
            raise TidalError(
                f"layer {layer}: expected a selection made earlier in this step, found none; "
                f"run the layers in order (plan {plan})"
            )
        out, _ = sparse_decode(
            q,
            k,
            v,
            _mapped(state.selection, config, layer),
            scale=scale,
            block_table=state.block_table,
            backend=config.backend,
        )
        return out
    out, _, scores = dense_decode(
        q,
        k,
        v,
        state.seq_lens,
        scale=scale,
        starts=state.starts,
        block_table=state.block_table,
        scores=score_kind(config) if role is Role.SELECT else None,
        backend=config.backend,
    )
    if scores is not None:
        if state.on_scores is not None:
            state.on_scores(layer, scores)
        state.select(scores)
        if state.memory is not None and state.selection is not None:
            state.memory[layer] = (0, state.selection)
    return out


def _mapped(selection: Selection, config: TidalConfig, layer: int) -> Selection:
    if not config.head_map:
        return selection
    heads = [int(digit) for digit in config.head_map.split(".")[layer]]
    return Selection(selection.positions[:, heads], selection.counts[:, heads])


def pool_scores(scores: torch.Tensor, config: TidalConfig, kv_heads: int) -> torch.Tensor:
    """Scores of sets from scores of query heads, where the kernel does not sum them itself."""
    if config.score == "softmax" or config.granularity == "query_head":
        return scores
    sets = 1 if config.granularity == "shared" else kv_heads
    grouped = scores.view(len(scores), sets, -1, scores.shape[2])
    return grouped.amax(2) if config.score == "max" else grouped.sum(2)


def score_kind(config: TidalConfig) -> ScoreKind:
    """The scores that `dense_decode` must emit for this configuration."""
    if config.score == "softmax":
        return config.granularity
    return "query_head_logits" if config.score == "logits" else "query_head"
