"""Cache correction (arXiv 2410.05076): recompute polluted tokens densely, and know which they are.

A token decoded with sparse attention leaves keys and values that full attention would not have
computed, and so does every token after it. A block of such tokens is recomputed in one dense forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tidaldecode.errors import TidalError


@dataclass
class PollutedTokens:
    """The tokens of one cache that were decoded sparsely since it was last as full attention's.

    They are neighbours: whatever follows a polluted token is polluted too.
    """

    begin: int = 0
    """Column of the first one in the cache."""
    starts: torch.Tensor | None = None
    """``[B]`` int32: first valid column of every row, or None for 0."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """What the decoder was fed: ids ``[B, 1]``, or embeddings ``[B, 1, hidden size]``."""
    positions: list[torch.Tensor] = field(default_factory=list)
    """``[B, 1]`` each: their positions."""

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def end(self) -> int:
        """Column behind the last one."""
        return self.begin + len(self)

    def add(
        self,
        column: int,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        starts: torch.Tensor | None,
    ) -> None:
        """Note the token in ``column``.

        Errors: `TidalError` where columns or rows do not go on from those noted before.
        """
        self.cut(column)
        if not self.inputs:
            self.begin = column
        elif column != self.end or len(inputs) != len(self.inputs[-1]):
            raise TidalError(
                f"cache: expected the next of {len(self.inputs[-1])} rows in column {self.end:,}, "
                f"got {len(inputs)} rows in column {column:,}, so tokens to correct are no longer "
                "known; call handle.correct() before a cache is changed by other means"
            )
        self.inputs.append(inputs)
        self.positions.append(positions)
        self.starts = starts

    def cut(self, length: int) -> None:
        """Forget the tokens that a cache of ``length`` columns no longer has."""
        kept = max(length - self.begin, 0)
        del self.inputs[kept:], self.positions[kept:]

    def correct(self, forward: Callable[[PollutedTokens], None]) -> int:
        """Let ``forward`` recompute the tokens densely, then forget them; how many there were.

        If it fails they stay noted.
        """
        count = len(self)
        if count:
            forward(self)
            self.inputs.clear()
            self.positions.clear()
        return count
