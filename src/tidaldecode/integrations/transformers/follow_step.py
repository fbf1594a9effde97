"""The steps of a captured draft after its first: all layers sparse, on the selections of that one."""

from __future__ import annotations

from tidaldecode.algorithm import HeldSelections
from tidaldecode.integrations.transformers.decode_step import DecodeStep


class FollowStep(DecodeStep):
    """Goes on where ``first`` stands, which must have run once: same rows, same cache, same tensors.

    Args:
        held: what ``first`` selects.

    Errors: as a `DecodeStep`.
    """

    def __init__(self, first: DecodeStep, held: HeldSelections) -> None:
        super().__init__(
            first.model, first.config, first.plan, batch=first.batch, capacity=first.capacity
        )
        self._held = held
        self.share_rows(first)
        self._layers.follows = held

    def _step(self) -> None:
        self._held.grow(self.seq_lens)
        super()._step()
