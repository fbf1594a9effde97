"""Which rows of a batch decode in this step, and what a layer does with them. Imports no vLLM.

vLLM puts the rows with one query token first. Those are ours; all rows after them, prefill, go to the
dense backend. Among ours some decode densely: the last token of a prompt that came in chunks looks
like a decode, and sequences below ``min_context`` are not worth a selection. Which ones is known on
the device only, so that one CUDA graph serves every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tidaldecode.algorithm import DecodeState, LayerPlan, Role, decode_attention
from tidaldecode.config import TidalConfig
from tidaldecode.kernels import Selection
from tidaldecode.kernels.scratch import Scratch, histogram_elements


@dataclass
class DecodeStep:
    """What the layers of one step share; made anew by the builder for every batch."""

    maker: StepMaker
    rows: int
    """Leading rows of the batch with one query token; row b's token is token b of the batch."""
    state: DecodeState
    rest: Any = None
    """The dense backend's metadata for the rows after ours, or None if there are none."""
    dense: bool = False
    """Whether all rows are the dense backend's; there is a step only to compile kernels first."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        *,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attention of a SELECT or SPARSE layer for our rows, into ``out``.

        ``q, out [rows, Hq, D]``; ``k, v [num_blocks, block_size, Hkv, D]``. A SELECT layer takes a few
        rows at a time where its scores would need too much memory.
        """
        maker, at_once = self.maker, self.maker.rows_at_once
        if maker.plan[layer] is Role.SPARSE or self.rows <= at_once:
            decode_attention(q, k, v, layer, maker.plan, self.state, scale=scale, out=out)
            return
        found = []
        for first in range(0, self.rows, at_once):
            some = slice(first, first + at_once)
            part = maker.begin(self.state.seq_lens[some], self._table[some])
            decode_attention(q[some], k, v, layer, maker.plan, part, scale=scale, out=out[some])
            found.append(_selection(part))
        self.state.selection = Selection(
            torch.cat([part.positions for part in found]),
            torch.cat([part.counts for part in found]),
        )

    @property
    def width(self) -> int:
        """Blocks that a row may have."""
        return self._table.shape[1]

    @property
    def _table(self) -> torch.Tensor:
        assert self.state.block_table is not None
        return self.state.block_table


class StepMaker:
    """Makes a batch's `DecodeStep`; owns what steps reuse, at addresses that a CUDA graph may keep."""

    def __init__(
        self,
        config: TidalConfig,
        plan: LayerPlan,
        *,
        sets: int,
        min_context: int,
        max_rows: int,
        rows_at_once: int,
        device: torch.device,
    ) -> None:
        """``sets``: selected sets of a row; ``rows_at_once``: rows whose scores fit into memory."""
        self.config, self.plan, self.min_context = config, plan, min_context
        self.rows_at_once = rows_at_once
        self._prefilling = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self._whole_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._scratch = Scratch(histogram_elements(min(max_rows, rows_at_once) * sets))
        self._scratch.zeros(1, device)  # now, and not within a capture
        self.is_warm = device.type != "cuda"

    def is_dense(self, max_seq_len: int) -> bool:
        """Whether no row of a batch with sequences up to ``max_seq_len`` tokens decodes sparsely."""
        return max_seq_len <= self.config.budget or max_seq_len < self.min_context

    def make(
        self,
        rows: int,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        prefilling: torch.Tensor | None,
    ) -> DecodeStep:
        """The step of the first ``rows`` rows.

        To be called for every batch, also one that will not use the step: a CUDA graph may run for it,
        which reads what is written here.

        Args:
            seq_lens: ``[>= rows]`` int32 on the device; ``block_table [>= rows, max_blocks]`` int32.
            prefilling: ``[any]`` bool on the host, rows beyond its end do not prefill; None: none does.
        """
        seq_lens = seq_lens[:rows]
        whole_lens = self._whole_lens[:rows]
        some = (
            None if prefilling is None or not bool(prefilling[:rows].any()) else prefilling[:rows]
        )
        if some is None and not self.min_context:
            whole_lens.zero_()
        else:
            whole = seq_lens < self.min_context
            if some is not None:
                flags = self._prefilling[:rows].zero_()
                flags[: len(some)].copy_(some, non_blocking=True)
                whole |= flags
            torch.mul(seq_lens, whole, out=whole_lens)
        state = self.begin(seq_lens, block_table[:rows])
        state.whole_lens = whole_lens
        return DecodeStep(self, rows, state)

    def begin(self, seq_lens: torch.Tensor, block_table: torch.Tensor) -> DecodeState:
        """What the layers share that attend to these rows."""
        return DecodeState.begin(
            self.config, self.plan, seq_lens, block_table=block_table, scratch=self._scratch
        )

    def warm_up(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: DecodeStep, scale: float
    ) -> None:
        """Once, and never during a capture: compile the kernels for every number of rows.

        Few rows are split over more programs, in smaller tiles and with more parts to merge. From some
        number on nothing changes, but that number depends on the heads, and asking is cheap.
        """
        if self.is_warm or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self.is_warm = True
        select, sparse = self.plan.layers(Role.SELECT)[0], self.plan.layers(Role.SPARSE)[:1]
        most = len(self._whole_lens)
        nothing = step.state.seq_lens.new_zeros(most)
        table = nothing.new_zeros(most, step.width)
        queries = q.new_zeros(most, *q.shape[1:])
        for rows in range(1, most + 1):
            state = self.begin(nothing[:rows], table[:rows])
            state.whole_lens = nothing[:rows]
            if rows <= self.rows_at_once:
                decode_attention(queries[:rows], k, v, select, self.plan, state, scale=scale)
                sets = _selection(state).counts.shape[1]
            else:
                state.selection = Selection(
                    nothing.new_zeros(rows, sets, self.config.budget), nothing.new_zeros(rows, sets)
                )
            for layer in sparse:
                decode_attention(queries[:rows], k, v, layer, self.plan, state, scale=scale)


def _selection(state: DecodeState) -> Selection:
    assert state.selection is not None
    return state.selection


def count_decode_rows(query_start_loc: torch.Tensor, max_query_len: int) -> int:
    """How many leading rows have one query token; all of them where none has more.

    ``query_start_loc [rows + 1]`` int32 on the host. Rows of no token, which pad a batch for a CUDA
    graph, stand at its end and may count: their length is 0.
    """
    rows = len(query_start_loc) - 1
    if max_query_len <= 1:
        return rows
    others = (query_start_loc.diff() != 1).nonzero()
    return int(others[0]) if len(others) else rows
