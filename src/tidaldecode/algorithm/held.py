"""Selections that outlive their step: the steps of a draft after the first attend to the same tokens.

A draft is verified, so it need not look at the whole context for every token of it: its first step
selects, and the others, in all layers, read what that one chose and the tokens that came since. Plain
sparse decoding cannot do so (docs/evaluation.md: already every second step loses the answers).
"""

from __future__ import annotations

import torch

from tidaldecode.algorithm.plan import LayerPlan, Role
from tidaldecode.config import TidalConfig
from tidaldecode.kernels import Selection


class HeldSelections:
    """The selections of every SELECT layer of one step, for up to ``room`` tokens after it.

    A layer attends to what the last SELECT layer up to it chose; layers before the first to the first's.
    Memory is allocated once, by the first selection, and stays where it is.
    """

    def __init__(self, plan: LayerPlan, room: int) -> None:
        self._selectors = plan.layers(Role.SELECT)
        self._room = room
        self._memory: _Memory | None = None

    @staticmethod
    def wanted(config: TidalConfig, plan: LayerPlan) -> bool:
        """Whether drafts select once, and the plan has layers whose selections can be held."""
        return config.draft_selection == "round" and bool(plan.layers(Role.SELECT))

    def hold(self, layer: int, selection: Selection, seq_lens: torch.Tensor) -> None:
        """Take over the ``selection`` that a SELECT layer made at ``seq_lens [B]``.

        Behind it go the positions of the tokens that are still to come; `grow` lets them in.
        """
        if self._memory is None:
            self._memory = _Memory.make(len(self._selectors), selection, self._room)
        memory = self._memory
        # Layers may be spread over devices; all selections are kept where the first was made.
        selection, seq_lens = selection.to(memory.device), seq_lens.to(memory.device)
        index = self._selectors.index(layer)
        positions, counts = memory.positions[index], selection.counts
        positions[..., : selection.positions.shape[2]] = selection.positions
        later = torch.arange(self._room, dtype=torch.int32, device=memory.device)
        coming = (seq_lens[:, None, None] + later).expand(*counts.shape, -1)
        positions.scatter_(2, (counts[..., None] + later).long(), coming)
        memory.selected[index] = counts
        memory.seq_lens.copy_(seq_lens)

    def grow(self, seq_lens: torch.Tensor) -> None:
        """Let the tokens in that have come since, up to ``seq_lens [B]``, at most ``room`` a row."""
        memory = self._held()
        come = seq_lens.to(memory.device) - memory.seq_lens
        torch.add(memory.selected, come[:, None], out=memory.counts)

    def at(self, layer: int) -> Selection:
        """What ``layer`` attends to."""
        memory = self._held()
        index = max(sum(selector <= layer for selector in self._selectors) - 1, 0)
        return Selection(memory.positions[index], memory.counts[index])

    def _held(self) -> _Memory:
        assert self._memory is not None, "nothing has been held yet"
        return self._memory


class _Memory:
    """``S`` selections: ``positions [S, B, R, N + room]``; ``selected, counts [S, B, R]``, all int32.

    ``counts`` are those of now, ``selected`` those of the step that selected, at ``seq_lens [B]``.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        selected: torch.Tensor,
        counts: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> None:
        self.positions, self.selected, self.counts = positions, selected, counts
        self.seq_lens = seq_lens
        self.device = positions.device

    @classmethod
    def make(cls, number: int, like: Selection, room: int) -> _Memory:
        batch, sets = like.counts.shape
        width = like.positions.shape[2] + room
        return cls(
            like.positions.new_full((number, batch, sets, width), -1),
            like.counts.new_zeros(number, batch, sets),
            like.counts.new_zeros(number, batch, sets),
            like.counts.new_zeros(batch),
        )
