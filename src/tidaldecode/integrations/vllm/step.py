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
from tidaldecode.kernels import dense_decode
from tidaldecode.kernels.scratch import Scratch


@dataclass
class DecodeStep:
    """What the layers of one step share; made anew by the builder for every batch."""

    rows: int
    """Leading rows of the batch with one query token; row b's token is token b of the batch."""
    plan: LayerPlan
    state: DecodeState
    dense_lens: torch.Tensor
    """``[rows]`` int32: the length of a row that decodes densely, 0 of any other."""
    any_dense: bool
    """Whether there may be such a row. Always true in a captured graph, which serves other batches."""
    rest: Any = None
    """The dense backend's metadata for the rows after ours, or None if there are none."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, *, scale: float
    ) -> torch.Tensor:
        """Attention of a SELECT or SPARSE layer for our rows: ``out [rows, Hq, D]``.

        ``q [rows, Hq, D]``; ``k, v [num_blocks, block_size, Hkv, D]``.
        """
        out = decode_attention(q, k, v, layer, self.plan, self.state, scale=scale)
        if self.plan[layer] is not Role.SPARSE or not self.any_dense:
            return out
        # A row of length 0 costs next to nothing, so this is cheap where nobody needs it.
        dense, _, _ = dense_decode(
            q,
            k,
            v,
            self.dense_lens,
            scale=scale,
            block_table=self.state.block_table,
            backend=self.state.config.backend,
        )
        return torch.where((self.dense_lens > 0)[:, None, None], dense, out)


class StepMaker:
    """Makes a batch's `DecodeStep`; owns what steps reuse, at addresses that a CUDA graph may keep."""

    def __init__(
        self,
        config: TidalConfig,
        plan: LayerPlan,
        *,
        min_context: int,
        max_rows: int,
        device: torch.device,
    ) -> None:
        self.config, self.plan, self.min_context = config, plan, min_context
        self._prefilling = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self._dense_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._scratch = Scratch()

    def is_dense(self, max_seq_len: int) -> bool:
        """Whether no row of a batch with sequences up to ``max_seq_len`` tokens decodes sparsely."""
        return max_seq_len <= self.config.budget or max_seq_len < self.min_context

    def make(
        self,
        rows: int,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        prefilling: torch.Tensor | None,
        *,
        captured: bool,
    ) -> DecodeStep:
        """The step of the first ``rows`` rows.

        Args:
            seq_lens: ``[>= rows]`` int32 on the device; ``block_table [>= rows, max_blocks]`` int32.
            prefilling: ``[any]`` bool on the host, rows beyond its end do not prefill; None: none does.
            captured: whether a CUDA graph will replay this step for other batches.
        """
        seq_lens, block_table = seq_lens[:rows], block_table[:rows]
        flags, dense_lens = self._prefilling[:rows], self._dense_lens[:rows]
        any_prefilling = prefilling is not None and bool(prefilling[:rows].any())
        flags.zero_()
        if prefilling is not None and any_prefilling:
            flags[: len(prefilling)].copy_(prefilling[:rows], non_blocking=True)
        dense = flags | (seq_lens < self.min_context)
        torch.mul(seq_lens, dense, out=dense_lens)
        state = DecodeState.begin(
            self.config, self.plan, seq_lens, block_table=block_table, scratch=self._scratch
        )
        return DecodeStep(
            rows,
            self.plan,
            state,
            dense_lens,
            any_dense=captured or any_prefilling or self.min_context > self.config.budget,
        )


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
